"""`torch.compile(model, backend="pbfx")`: torch finds it by its entry point."""

from pbfx.backend.compiler import compile_graph

__all__ = ["compile_graph"]
