"""Name of the custom operators' namespace: unique per build when the Hub's builder made this package, fixed otherwise."""

try:
    from ._ops import add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        """`name` qualified by the package's namespace."""
        return f"mla_attention::{name}"


__all__ = ["add_op_namespace_prefix"]
