"""Tokenises and generates the text, once for all parts; with --work, for later calls as well."""

from harness import corpus_of, signal


def main(args):
    corpus_of(args, args.tokens)
    signal(args, "text")
