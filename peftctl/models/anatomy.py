"""Where the parts of a transformer are, found by structure rather than by architecture names."""

from __future__ import annotations

from torch import nn

from peftctl.errors import UsageError


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the transformer blocks of a decoder-only or encoder-only model.

    Raises:
        UsageError: No list of modules is as long as `config.num_hidden_layers`, or several are (encoder-decoders).
    """
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outer = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists)]
    if len(outer) != 1:
        found = ", ".join(name for name, _ in outer) or "none"
        raise UsageError(
            f"the {model.config.model_type} architecture is not supported here: "  # type: ignore[union-attr]
            f"expected one list of {depth} blocks, found {found}"
        )
    return outer[0]  # type: ignore[return-value]
