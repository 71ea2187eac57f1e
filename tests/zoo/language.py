"""Language models in the manner of the large libraries: configurations, outputs, options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.member import Arguments, Member


@dataclasses.dataclass
class EncoderConfig:
    """Sizes and switches of an encoder."""

    vocab_size: int = 13
    hidden_size: int = 8
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 12
    max_position_embeddings: int = 10
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.3
    output_attentions: bool = False
    output_hidden_states: bool = True
    use_return_dict: bool = True
    chunk_size_feed_forward: int = 0


@dataclasses.dataclass
class EncoderOutput:
    """What an encoder returns; absent parts are None."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the parts that are there."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(part for part in parts if part is not None)


class PreTrainedModel(nn.Module):
    """What all models of this manner share."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False

    def post_init(self) -> None:
        """Draw all weights."""
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()

    def gradient_checkpointing_enable(self) -> None:
        """Trade time for memory in every part that can."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Count the parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


class Embeddings(nn.Module):
    """Words, positions and segments, added and normed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        positions = torch.arange(config.max_position_embeddings).expand((1, -1))
        self.register_buffer("position_ids", positions, persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_length: int = 0,
    ) -> Tensor:
        shape = input_ids.size() if input_ids is not None else inputs_embeds.size()[:-1]
        if position_ids is None:
            position_ids = self.position_ids[:, past_length : shape[1] + past_length]
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long, device=self.position_ids.device)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        total = inputs_embeds + self.token_type_embeddings(token_type_ids)
        total += self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(total))


class SelfAttention(nn.Module):
    """Three projections, heads by view and permute."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def split(self, x: Tensor) -> Tensor:
        """Return (batch, heads, length, head_size)."""
        return x.view(*x.size()[:-1], self.num_heads, self.head_size).permute(0, 2, 1, 3)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        query, key = self.split(self.query(hidden_states)), self.split(self.key(hidden_states))
        value = self.split(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.head_size)
        if attention_mask is not None:
            scores = scores + attention_mask
        probs = self.dropout(F.softmax(scores, dim=-1))
        if head_mask is not None:
            probs = probs * head_mask
        context = torch.matmul(probs, value).permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.size()[:-2], self.num_heads * self.head_size)
        return context, probs if output_attentions else None


class AttentionOutput(nn.Module):
    """The projection after attention, dropped, added and normed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class EncoderAttention(nn.Module):
    """Attention and its output; the first is named `self`, as pretrained keys want it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self, self.output = SelfAttention(config), AttentionOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        context, probs = self.self(hidden_states, attention_mask, head_mask, output_attentions)
        return self.output(context, hidden_states), probs


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each normed after the sum."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = EncoderAttention(config)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        outputs = self.attention(hidden_states, *args, **kwargs)
        hidden = outputs[0]
        fed = self.dropout(self.output(F.gelu(self.intermediate(hidden))))
        return (self.norm2(fed + hidden), *outputs[1:])


class Encoder(nn.Module):
    """A stack of layers that collects what it is asked for."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: list[Tensor | None] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        all_states: tuple[Tensor, ...] | None = () if output_hidden_states else None
        all_probs: tuple[Tensor, ...] | None = () if output_attentions else None
        for i, layer in enumerate(self.layer):
            if output_hidden_states:
                all_states = (*all_states, hidden_states)
            mask = head_mask[i] if head_mask is not None else None
            arguments = hidden_states, attention_mask, mask, output_attentions
            if self.gradient_checkpointing and self.training:
                outputs = checkpoint(layer.__call__, *arguments, use_reentrant=False)
            else:
                outputs = layer(*arguments)
            hidden_states = outputs[0]
            if output_attentions:
                all_probs = (*all_probs, outputs[1])
        if output_hidden_states:
            all_states = (*all_states, hidden_states)
        return EncoderOutput(hidden_states, None, all_states, all_probs)


class EncoderModel(PreTrainedModel):
    """Embeddings, encoder, pooler."""

    def __init__(self, config: EncoderConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings, self.encoder = Embeddings(config), Encoder(config)
        self.pooler = (
            nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of words."""
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: list[Tensor | None] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> EncoderOutput | tuple[Any, ...]:
        config = self.config
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        return_dict = return_dict if return_dict is not None else config.use_return_dict
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("give input_ids or inputs_embeds, not both")
        if input_ids is None and inputs_embeds is None:
            raise ValueError("give input_ids or inputs_embeds")
        embedded = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds
        )
        mask = None
        if attention_mask is not None:
            if attention_mask.dim() == 3:
                mask = attention_mask[:, None, :, :]
            elif attention_mask.dim() == 2:
                mask = attention_mask[:, None, None, :]
            else:
                raise ValueError(f"attention_mask has {attention_mask.dim()} axes, not 2 or 3")
            mask = (1.0 - mask.to(embedded.dtype)) * torch.finfo(embedded.dtype).min
        encoded = self.encoder(
            embedded,
            attention_mask=mask,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if self.pooler is not None:
            encoded.pooler_output = torch.tanh(self.pooler(encoded.last_hidden_state[:, 0]))
        return encoded if return_dict else encoded.to_tuple()


class MaskedLanguageModel(PreTrainedModel):
    """An encoder and a head whose matrix is the table of words; the loss comes with labels."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.bert = EncoderModel(config, add_pooling_layer=False)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head read the table of words."""
        self.decoder.weight = self.bert.get_input_embeddings().weight

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        outputs = self.bert(input_ids, **kwargs)
        logits = self.decoder(F.gelu(self.transform(outputs.last_hidden_state)))
        result = {"logits": logits}
        if labels is not None:
            result["loss"] = F.cross_entropy(
                logits.view(-1, self.config.vocab_size), labels.view(-1), ignore_index=-100
            )
        return result


@dataclasses.dataclass
class DecoderConfig:
    """Sizes of a decoder."""

    vocab_size: int = 13
    n_embd: int = 8
    n_layer: int = 2
    n_head: int = 2
    n_positions: int = 12
    dropout: float = 0.1


class CausalAttention(nn.Module):
    """Attention to the past, with a growing cache of keys and values if asked."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        size = config.n_positions
        mask = torch.tril(torch.ones(size, size, dtype=torch.bool)).view(1, 1, size, size)
        self.register_buffer("bias", mask, persistent=False)

    def forward(
        self, x: Tensor, layer_past: tuple[Tensor, Tensor] | None = None, use_cache: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        b, t, c = x.size()
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(c, dim=2)
        )
        if layer_past is not None:
            k, v = torch.cat([layer_past[0], k], dim=-2), torch.cat([layer_past[1], v], dim=-2)
        total = k.size(-2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(~self.bias[:, :, total - t : total, :total], float("-inf"))
        weight = F.dropout(F.softmax(scores, dim=-1), self.dropout, self.training)
        y = (weight @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.c_proj(y), (k, v) if use_cache else None


class DecoderBlock(nn.Module):
    """Normed before attention and perceptron."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(config)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)}
        )

    def forward(
        self, x: Tensor, layer_past: tuple[Tensor, Tensor] | None, use_cache: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        attended, present = self.attn(self.ln_1(x), layer_past=layer_past, use_cache=use_cache)
        x = x + attended
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)))), present


class CausalLanguageModel(PreTrainedModel):
    """A decoder with tied weights and greedy generation."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor | None, list[Any] | None]:
        length = input_ids.size(1)
        past = past_key_values[0][0].size(-2) if past_key_values else 0
        assert past + length <= self.config.n_positions, "the text is too long"
        positions = torch.arange(past, past + length, device=input_ids.device)
        parts = self.transformer
        x = parts["drop"](parts["wte"](input_ids) + parts["wpe"](positions))
        presents: list[Any] | None = [] if use_cache else None
        for i, block in enumerate(parts["h"]):
            x, present = block(x, past_key_values[i] if past_key_values else None, use_cache)
            if presents is not None:
                presents.append(present)
        x = parts["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None, presents
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
        return logits, loss, presents

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, use_cache: bool = True) -> Tensor:
        """Append the likeliest token again and again."""
        past, step = None, input_ids
        for _ in range(max_new_tokens):
            logits, _, past = self(step, past_key_values=past, use_cache=use_cache)
            token = logits[:, -1, :].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=1)
            step = token if use_cache else input_ids
        return input_ids


class SequenceClassifier(nn.Module):
    """torch's own transformer layers under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        # Nested tensors would be used in evaluation only, and warn that they are a prototype.
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=mask).mean(1))


def _text(generator: torch.Generator) -> Tensor:
    return torch.randint(1, 13, (3, 6), generator=generator)


def _masked(generator: torch.Generator) -> Arguments:
    tokens, mask = _text(generator), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return (), {"input_ids": tokens, "attention_mask": mask}


def _masked_with_labels(generator: torch.Generator) -> Arguments:
    arguments = _masked(generator)[1]
    labels = torch.where(torch.arange(6) % 3 == 0, arguments["input_ids"], -100)
    return (), arguments | {"labels": labels}


def _embedded(generator: torch.Generator) -> Arguments:
    return (), {"inputs_embeds": torch.randn(3, 6, 8, generator=generator), "return_dict": False}


def _next(generator: torch.Generator) -> Arguments:
    tokens = _text(generator)
    return (tokens[:, :-1],), {"targets": tokens[:, 1:]}


def _prompt(generator: torch.Generator) -> Arguments:
    return (_text(generator),), {"use_cache": True}


def _steps(generator: torch.Generator) -> Arguments:
    return (torch.randn(3, 4, 5, generator=generator),), {}


def _checkpointed() -> nn.Module:
    model = EncoderModel(EncoderConfig())
    model.gradient_checkpointing_enable()
    return model


_PROMPT = torch.tensor([[1, 5, 2], [7, 7, 3]])
_COMMON = {
    "num_parameters": lambda m: m.num_parameters(),
    "config": lambda m: m.config.vocab_size,
    "device": lambda m: str(m.device),
}

MEMBERS = [
    Member(
        "bert-like",
        lambda: EncoderModel(EncoderConfig()),
        _masked,
        13,
        rungs="submodule op",
        methods=_COMMON | {"get_input_embeddings": lambda m: m.get_input_embeddings()(_PROMPT)},
        eval_inputs=_embedded,
    ),
    Member(
        "bert-like, checkpointed", _checkpointed, _masked, 13, rungs="submodule op", methods=_COMMON
    ),
    Member(
        "masked language model",
        lambda: MaskedLanguageModel(EncoderConfig(output_hidden_states=False)),
        _masked_with_labels,
        14,
        rungs="submodule op",
        eval_inputs=_masked,
    ),
    Member(
        "gpt-like",
        lambda: CausalLanguageModel(DecoderConfig()),
        _next,
        9,
        rungs="submodule op",
        eval_inputs=_prompt,
        methods=_COMMON
        | {
            "generate": lambda m: m.generate(_PROMPT, 5),
            "generate without cache": lambda m: m.generate(_PROMPT, 5, use_cache=False),
        },
    ),
    Member(
        "torch's transformer",
        SequenceClassifier,
        _steps,
        10,
        rungs="whole op",
        left_out={
            f"encoder.layers.{i}.self_attn.{weight}": "MultiheadAttention"
            for i in (0, 1)
            for weight in ("in_proj_weight", "out_proj.weight")
        },
    ),
]
