"""Tokenises the text and has the original write, once for all parts; with --work, for later calls as well."""

from harness import corpus_of, signal


def main(args):
    corpus_of(args, args.tokens)
    signal(args, "text")
