"""Tokenises the text and has the original write, once for all parts; with --work, for later calls as well."""

from common import corpus_of, mark


def main(args):
    corpus_of(args, args.tokens)
    mark(args, "text")
