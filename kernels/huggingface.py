"""trilby for Hugging Face's transformers: `import trilby.kernels.huggingface`, then `attn_implementation="trilby"`.

Importing this registers the name with both of transformers' tables, of attention functions and of masks::

    import trilby.kernels.huggingface
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="trilby")

It is transformers' own "sdpa" wherever trilby has no faster kernel: a padded batch, whose mask transformers builds; one
query at a time with a cache; dropout in training; a bias on positions. And it takes the masks that "sdpa" takes: none
where plain causality says it all.
"""

from inspect import signature
from typing import Any

from torch import Tensor, nn

from .attention import reasons_for_pytorch, scaled_dot_product_attention
from .attention_arguments import AttentionArguments

try:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # type: ignore[import-not-found, unused-ignore]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # type: ignore[import-not-found, unused-ignore]
except ImportError as missing:  # 4.53 is the first with a table of masks to register with
    raise ImportError("trilby.kernels.huggingface needs transformers 4.53 or newer") from missing

NAME = "trilby"

_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
# What this transformers' sdpa takes beyond what attention is to trilby, and what no sdpa takes.
_OPTIONS = {"softcap", "output_attentions", *signature(_sdpa).parameters}
_OPTIONS -= {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' models call it.

    Args:
        module: The model's attention layer; its `is_causal` holds if none is given.
        query: [B, H, T, D].
        key: [B, Hkv, S, D], H a multiple of Hkv.
        value: [B, Hkv, S, Dv].
        attention_mask: What transformers' "sdpa" takes; it hides what is to be hidden, whatever `is_causal` says.
        dropout: The probability that a weight is dropped.
        scaling: What scores are multiplied by; 1/√D by default.
        is_causal: Hide from query i every key after i; a single query sees all keys.
        options: What else "sdpa" takes; calls with one that trilby does not know are computed by it.

    Returns:
        [B, T, H, Dv], contiguous, and None, for the weights are never held.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask[..., : key.shape[2]]  # it may have room for keys to come
    asked_for = any(options.get(name) not in (None, False) for name in _OPTIONS)
    asked = AttentionArguments(query, key, value, attention_mask, dropout, enable_gqa=True)
    if asked_for or reasons_for_pytorch(asked):
        results: tuple[Tensor, Tensor | None] = _sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return results
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        is_causal and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=True,
    )
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
