"""How many floating-point operations a model needs, counted from its shapes."""

from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.packing import PackLayout


def forward_flops(model: PixelFlow, layout: PackLayout, context_length: int = 0) -> int:
    """Operations of the matrix products of one forward pass over one row.

    A multiply-add counts as two; norms, gates and rotations are left out, as MFU's definition has it
    (PaLM, arXiv 2204.02311, appendix B). Training costs three times as much.
    """
    dim, tokens, sequences = model.num_heads * model.head_dim, layout.row_length, layout.num_sequences
    per_token = 4 * dim * dim + 8 * dim * dim  # q, k, v, o; the MLP's two
    attention = sum(2 * group.count * group.length**2 * dim for group in layout.groups)
    layer = tokens * per_token + attention + sequences * 6 * dim * dim
    if model.context_dim:
        text = sequences * context_length
        cross = sum(2 * g.count * g.length * context_length * dim for g in layout.groups)
        layer += tokens * 2 * dim * dim + text * 2 * model.context_dim * dim + cross
    ends = 2 * tokens * 3 * model.patch_size**2 * dim + sequences * 2 * dim * dim
    return 2 * (model.depth * layer + ends)
