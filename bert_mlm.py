"""BERT (Devlin et al. 2018) pre-trained from a stream of text by masked LM, then put to use, in one file.

    python bert_mlm.py --steps 1000         # offline: a small BERT on the source of Python's standard library
    python bert_mlm.py --preset bert-base   # BERT-base on FineWeb-Edu, streamed from the Hugging Face hub
    python bert_mlm.py --steps 0 --init-from out/bert-001 --prompt "for i in [MASK](10):"    # fill the mask
    python bert_mlm.py --preset classify --data reviews.csv --init-from bert-base-uncased    # fine-tune

Documents are tokenised as they arrive, joined by [SEP] and packed into rows [CLS] ... [SEP] without padding.
Masks are drawn on the device, at most M in every row: the head works on these positions alone. A run
killed at any moment goes on with --resume, bit for bit. It ends as a Hugging Face model folder.

Measured on two CPU cores: the first command guesses 38 % of the masked held-out tokens, at a loss of 3.27.

Shapes: B batch, T tokens, M masked ones, C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import common
from common import checkpoint_names, encode, expect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import PartitionSpec as P
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig, MegatronBertConfig, PreTrainedTokenizerFast


@dataclasses.dataclass
class Config(common.RunConfig):
    # a recipe: other defaults for the flags below
    preset: Literal["stdlib", "bert-mini", "bert-base", "bert-large", "classify"] = "stdlib"
    task: Literal["mlm", "classify"] = "mlm"  # pre-train by masked LM, or classify texts (see the preset)
    # data
    data: tuple[str, ...] = ("stdlib",)  # stdlib (Python's source), synthetic, hub ids, files, URLs, folders
    data_name: tuple[str, ...] = ()  # configuration of each hub data set, as in sample-10BT; - for none
    data_weights: tuple[float, ...] = ()  # share of each --data in the rows; equal without
    text_column: str | None = None  # column with the text; found if there is one called text, or only one
    label_column: str | None = None  # column with the class, an int; found by its type or name
    val_data: tuple[str, ...] = ()  # to validate on; else data's validation or test split, or first documents
    val_docs: int = 10  # documents to validate on; they and their copies are never trained on
    tokenizer: str | None = None  # hub id, folder or bpe:N (trained); else init_from's, or bpe:2048
    seq_len: int = 32  # tokens in a row, T
    shuffle_buffer: int = 1_000  # documents whose rows are shuffled together
    # model
    n_layer: int = 4  # blocks, L; with init_from all sizes are its own
    n_head: int = 4  # attention heads, H
    n_embd: int = 128  # width, C
    pre_norm: bool = True  # norms before each block and at the end (Megatron's BERT): needs less warm-up
    dropout: float | None = None  # on embeddings, attention and residual branches; else init_from's, or 0
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 1_000  # optimizer steps; 0 only evaluates, fills masks or embeds, from init_from
    batch_size: int = 128  # rows a step, over all devices
    device_rows: int = 32  # rows that a device takes at once: a CPU's caches like few, a GPU many
    accum: int | None = None  # microbatches in a step; else as few as device_rows allows
    mask_share: float = 0.15  # share of a row's tokens to predict
    optimizer: Literal["adamw", "muon"] = "muon"  # muon is for the hidden matrices; the rest stays on adamw
    lr: float = 1e-2  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end
    cooldown: float = 0.0  # last share of the steps, in which a constant rate falls; 0 falls after warm-up
    warmup_steps: int = 50  # steps in which the rate rises in a line to lr
    weight_decay: float = 0.01  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, masks and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    # use
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # text with a [MASK]
    embed: str | None = None  # text file to embed, a text a line, into an .npy beside it
    mteb: tuple[str, ...] = ()  # tasks of the mteb package to evaluate embeddings on, as in STSBenchmark
    pooling: Literal["mean", "cls"] | None = None  # a text's vector; else as in init_from's folder, or mean


# batch, 6 % of warm-up, base's and large's rates of MosaicBERT (arXiv 2312.17482); 10 B tokens in all
HUB = dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="bert-base-uncased")
HUB |= dict(shuffle_buffer=10_000, val_docs=1_000, seq_len=128, batch_size=4_096, steps=19_073)
HUB |= dict(pre_norm=False, optimizer="adamw", warmup_steps=1_150, dtype="bfloat16")
PRESETS = {
    "stdlib": {},
    "bert-mini": HUB | dict(n_layer=4, n_head=4, n_embd=256, lr=1e-3, device_rows=2_048),
    "bert-base": HUB | dict(n_layer=12, n_head=12, n_embd=768, lr=5e-4, device_rows=512),
    "bert-large": HUB | dict(n_layer=24, n_head=16, n_embd=1024, lr=2e-4, device_rows=128, remat=True),
    "classify": dict(task="classify", optimizer="adamw", lr=1e-4, seq_len=128, batch_size=32, val_docs=500),
}

# these may change when a run goes on, beside those of RunConfig: they do not change what its checkpoint means
FREE = "steps device_rows accum lr min_lr cooldown warmup_steps weight_decay grad_clip dropout remat"


# ---- data ----


def load_tokenizer(name, documents=()):
    """The tokenizer called `name`: a hub id, a folder, or "bpe:N", trained on `documents`."""
    kind, _, size = name.partition(":")
    if kind != "bpe":
        tokenizer = common.load_tokenizer(name)
        with common.blame(f"--tokenizer {name}"):
            for role in ("mask_token", "cls_token", "sep_token", "pad_token"):
                expect(getattr(tokenizer, role) is not None, f"has no {role}; BERT needs one")
            right = tokenizer.truncation_side == tokenizer.padding_side == "right"
            expect(right, "truncates or pads at the left, only the right is supported")
        return tokenizer
    expect(size.isdecimal() and int(size) > 261, f"--tokenizer {name}: expected bpe:N, N above 261")
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    special["mask_token"] = AddedToken("[MASK]", lstrip=True)  # takes the space before it, as words do
    words = (re.sub(r"\S{100}", r"\g<0> ", text) for text in documents)  # time grows with a word's square
    tokenizer = ByteLevelBPETokenizer()
    options = dict(special_tokens=[*special.values()], min_frequency=0, show_progress=False)
    tokenizer.train_from_iterator(words, int(size), **options)
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)


def frame(tokenizer, rows, length):
    """[CLS] row [SEP] of each row of ids, cut or padded: tokens (N, length), lengths (N,), int32."""
    tokens = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    lengths = np.array([min(len(row) + 2, length) for row in rows], np.int32)
    for out, row, n in zip(tokens, rows, lengths):
        out[0], out[1 : n - 1], out[n - 1] = tokenizer.cls_token_id, row[: n - 2], tokenizer.sep_token_id
    return tokens, lengths


def pack(tokenizer, held_out, length, records, rng):
    """Rows {"tokens": (length,) int32} of the documents {"text": list} but for those held out, shuffled.

    They are joined and cut from a random start, without padding; less than a row is lost at either end.
    """
    texts = [text for text in records["text"] if text not in held_out]
    tokens = np.concatenate([np.zeros(0, np.int32), *encode(tokenizer, texts, [tokenizer.sep_token_id])])
    inner = length - 2
    start = rng.integers(min(inner, max(len(tokens) - inner, 0) + 1))
    tokens = tokens[start : start + (len(tokens) - start) // inner * inner]
    rows, _ = frame(tokenizer, rng.permutation(tokens.reshape(-1, inner)), length)
    return [{"tokens": row} for row in rows]


def label_rows(tokenizer, held_out, length, records, rng):
    """Rows of {"text": list, "label": list} but for texts held out, shuffled; a text is cut or padded."""
    pairs = [pair for pair in zip(records["text"], records["label"]) if pair[0] not in held_out]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    tokens, lengths = frame(tokenizer, encode(tokenizer, [text for text, _ in pairs], special=True), length)
    targets, weights = np.array([label for _, label in pairs], np.int32), np.ones(len(pairs), np.float32)
    columns = dict(tokens=tokens, lengths=lengths, targets=targets, weights=weights)
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def mask_tokens(key, tokens, tokenizer, *, share=0.15):
    """Hide some of tokens (B, T) -> dict(tokens (B, T), and (B, M): positions, targets, weights).

    Of n tokens in a row that are not special exactly max(1, round(share n)) are to be predicted: 80 % become
    the mask, 10 % any ordinary token, 10 % stay (Devlin et al. 2018). M is enough for n = T; where a row
    needs fewer, the rest of its M places weigh 0.
    """
    (B, T), n = tokens.shape, np.arange(tokens.shape[1] + 1)
    quotas = np.maximum(np.floor(share * n + 0.5), n > 0).astype(np.int32)
    M, where_key, how_key, token_key = int(quotas[T]), *jax.random.split(key, 3)
    special = np.unique(tokenizer.all_special_ids)
    ordinary = jnp.array(np.setdiff1d([*tokenizer.get_vocab().values()], special))  # ids may have gaps
    real = jnp.all(tokens[..., None] != special, axis=-1)
    quota = jnp.asarray(quotas)[jnp.sum(real, axis=1, keepdims=True)]  # (B, 1)
    scores = jnp.where(real, jax.random.uniform(where_key, (B, T)), 2)
    positions = jnp.argsort(scores, axis=1)[:, :M]
    weights = (jnp.arange(M) < quota).astype(jnp.float32)  # (B, M)
    targets = jnp.take_along_axis(tokens, positions, axis=1)
    dice = jax.random.uniform(how_key, (B, M))
    random = ordinary[jax.random.randint(token_key, (B, M), 0, len(ordinary))]
    hidden = jnp.where(dice < 0.8, tokenizer.mask_token_id, jnp.where(dice < 0.9, random, targets))
    hidden = jnp.where(weights > 0, hidden, targets)
    tokens = jnp.put_along_axis(tokens, positions, hidden, axis=1, inplace=False)
    return dict(tokens=tokens, positions=positions, targets=targets, weights=weights)


# ---- model ----

gelu = partial(jax.nn.gelu, approximate=False)  # by erf; GPT-2's is the tanh one
dropout = lambda x, rate, key: nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)  # none without key
is_pre_norm = lambda config: config.model_type == "megatron-bert"


class Linear(nnx.Linear):
    """nnx.Linear, but the bias is added in float32: bfloat16 cannot hold its gradient, a sum over tokens."""

    def __call__(self, x):
        y = common.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return (y + self.bias[...]).astype(self.dtype)


class SelfAttention(nnx.Module):
    def __init__(self, config, linear):
        self.n_head, self.rate = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query, self.key, self.value = (linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def __call__(self, x, lengths, key):
        B, T, C = x.shape
        q, k, v = (f(x).reshape(B, T, self.n_head, -1) for f in (self.query, self.key, self.value))
        rate = 0 if key is None else self.rate
        if rate == 0 and common.has_fused_attention(q):
            y = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
        else:  # the fused kernel knows no dropout
            scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
            seen = jnp.arange(T) < (T if lengths is None else lengths[:, None, None, None])
            scores = jnp.where(seen, scores / math.sqrt(q.shape[-1]), -jnp.inf)
            weights = dropout(jax.nn.softmax(scores), rate, key)
            y = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)
        return y.reshape(B, T, C)


class Layer(nnx.Module):
    """Attention and MLP; norms after each, or before each where the config is Megatron's."""

    def __init__(self, config, linear, norm):
        C, inner = config.hidden_size, config.intermediate_size
        self.pre_norm, self.rate = is_pre_norm(config), config.hidden_dropout_prob
        # pre-norm keeps the variance of the residual stream (Radford et al. 2019)
        scale = 1 / math.sqrt(2 * config.num_hidden_layers) if self.pre_norm else 1.0
        back = partial(linear, kernel_init=nnx.initializers.normal(config.initializer_range * scale))
        self.attention = nnx.Dict({"self": SelfAttention(config, linear)})  # the checkpoint's names
        self.attention.output = nnx.Dict(dense=back(C, C))
        self.intermediate, self.output = nnx.Dict(dense=linear(C, inner)), nnx.Dict(dense=back(inner, C))
        if self.pre_norm:
            self.attention.ln, self.ln = norm(), norm()
        else:
            self.attention.output.LayerNorm, self.output.LayerNorm = norm(), norm()

    def __call__(self, x, lengths, key=None):
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        y = self.attention["self"](self.attention.ln(x) if self.pre_norm else x, lengths, keys[0])
        x = x + dropout(self.attention.output.dense(y), self.rate, keys[1])
        x = x if self.pre_norm else self.attention.output.LayerNorm(x)
        y = gelu(self.intermediate.dense(self.ln(x) if self.pre_norm else x))
        x = x + dropout(self.output.dense(y), self.rate, keys[2])
        return x if self.pre_norm else self.output.LayerNorm(x)


class BERT(nnx.Module):
    """BERT (Devlin et al. 2018), its attributes named as in the published checkpoints.

    `config`: BertConfig, or MegatronBertConfig for pre-norm, of transformers. `head`: mlm, classify or None.
    model(tokens (B, T) int32, lengths (B,), token_types (B, T)) -> hidden (B, T, C), in `dtype`. Beyond its
    length a row is padding. Dropout only where a key is given.
    """

    def __init__(self, config, *, head="mlm", dtype="float32", remat=False, rngs):
        self.config, self.head, self.dtype, self.remat = nnx.static(config), head, dtype, remat
        C, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        linear = partial(Linear, kernel_init=init, dtype=dtype, rngs=rngs)  # its kernel is (in, out)
        norm = partial(nnx.LayerNorm, C, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        # in float32: a token is in many places, and bfloat16 cannot hold the sum of their gradients
        embed = partial(nnx.Embed, features=C, embedding_init=init, rngs=rngs)
        layers = nnx.List([Layer(config, linear, norm) for _ in range(config.num_hidden_layers)])
        V = -(-config.vocab_size // 128) * 128  # whole tiles; the padding is never seen outside
        tables = nnx.Dict(word_embeddings=embed(V), position_embeddings=embed(config.max_position_embeddings))
        tables.token_type_embeddings = embed(config.type_vocab_size)
        self.bert = nnx.Dict(embeddings=tables, encoder=nnx.Dict(layer=layers))
        if is_pre_norm(config):
            self.bert.encoder.ln = norm()
        else:
            self.bert.embeddings.LayerNorm = norm()
        if head == "mlm":
            transform = nnx.Dict(dense=linear(C, C), LayerNorm=norm())
            bias = nnx.Param(jnp.zeros(config.vocab_size))
            self.cls = nnx.Dict(predictions=nnx.Dict(transform=transform, bias=bias))
        if head == "classify":
            self.bert.pooler = nnx.Dict(dense=linear(C, C))
            self.classifier = linear(C, config.num_labels)

    def __call__(self, tokens, lengths=None, token_types=0, key=None):
        n, tables = len(self.bert.encoder.layer), self.bert.embeddings
        keys = [None] * (n + 1) if key is None else jax.random.split(key, n + 1)
        x = tables.word_embeddings(tokens) + tables.position_embeddings(jnp.arange(tokens.shape[1])[None])
        types = tables.token_type_embeddings.embedding[...]  # as a module it fails where there is but one
        x = x + jnp.take(types, jnp.asarray(token_types), axis=0)  # (B, T, C)
        x = x if is_pre_norm(self.config) else tables.LayerNorm(x)
        x = dropout(x.astype(self.dtype), self.config.hidden_dropout_prob, keys[n])
        for i, layer in enumerate(self.bert.encoder.layer):
            layer = jax.checkpoint(layer.__call__) if self.remat else layer
            x = layer(x, lengths, keys[i])
        return self.bert.encoder.ln(x) if is_pre_norm(self.config) else x

    def mlm_logits(self, hidden):
        """Logits (..., V) float32 of hidden states (..., C); the decoder is tied to the word embeddings."""
        head = self.cls.predictions
        x = head.transform.LayerNorm(gelu(head.transform.dense(hidden)))
        table = self.bert.embeddings.word_embeddings.embedding[...].astype(x.dtype)  # (V padded, C)
        return common.matmul(x, table.T)[..., : self.config.vocab_size].astype(jnp.float32) + head.bias[...]

    def class_logits(self, hidden, key=None):
        """Logits (B, classes) float32 of hidden states (B, T, C), from the first token."""
        rate = getattr(self.config, "classifier_dropout", None)
        rate = self.config.hidden_dropout_prob if rate is None else rate
        pooled = dropout(jnp.tanh(self.bert.pooler.dense(hidden[:, 0])), rate, key)
        return self.classifier(pooled).astype(jnp.float32)


# ---- pretrained weights in and out ----

WORDS = "bert.embeddings.word_embeddings.weight"
# tables that are one in the model; files have them under either name, or both
TIED = {"cls.predictions.decoder.weight": WORDS, "cls.predictions.decoder.bias": "cls.predictions.bias"}
OPTIONAL = ("cls.", "classifier.", "bert.pooler.", "bert.embeddings.position_ids")  # in a checkpoint


def read_weights(path):
    """(config, {name: array}) of a BERT, with our names and shapes. Raises UsageError for what is none."""
    followed = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size layer_norm_eps"
    followed += " hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings type_vocab_size"
    followed += " classifier_dropout chunk_size_feed_forward"
    config, stored, _ = common.read_pretrained((BertConfig, MegatronBertConfig), path, followed)
    weights = {}
    for given, w in stored.items():
        # the oldest files have gamma and beta, and bare encoders no prefix
        name = given.replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        name = TIED.get(name, name)
        w = w if "_embeddings." in name else w.T  # kernels are (out, in) there
        if name == WORDS:
            expect(len(w) == config.vocab_size, f"{name} has {len(w)} rows, not {config.vocab_size}")
            w = np.pad(w, [(0, -len(w) % 128), (0, 0)])
        same = np.array_equal(weights.setdefault(name, w), w, equal_nan=True)
        expect(same, f"{given} is not {name}; only tied ones are supported")
    return config, weights


def from_pretrained(path, *, head="any", classes=None, seed=None, dtype="float32", remat=False, **overrides):
    """The BERT of a hub id, a folder or a run directory; `overrides` change its config.

    `head`: mlm, classify, None, or any that the checkpoint has; with a `seed` one that it lacks is drawn. A
    classifier's outputs are put in the order of the names `classes`.
    """
    (config, weights), why = read_weights(path), ""
    config.update(overrides)
    classifier = [name for name in weights if name.startswith("classifier.")]
    if head == "any":
        marks = {"classifier.weight": "classify", "cls.predictions.transform.dense.weight": "mlm"}
        head = next((marks[name] for name in marks if name in weights), None)
    if classes and classifier:
        order, classes, why = common.match_classes(common.class_names(config), classes)
        for name in classifier:
            w = weights.pop(name)
            if order:  # one of another size is refused below
                weights[name] = w[..., order] if w.shape[-1] == len(order) else w
    if classes:
        config.update(common.label_names(classes))
    create = lambda: BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed or 0))
    model = nnx.eval_shape(create) if seed is None else nnx.jit(create)()
    names = checkpoint_names(model)
    weights = {name: w for name, w in weights.items() if name in names or not name.startswith(OPTIONAL)}
    new = common.load_weights(names, weights, OPTIONAL)
    why = why or f"has no {', '.join(new)}"
    expect(seed is not None or not new, f"{why}, so no head for {head}")
    if new:
        print(f"head       new: {why}")
    return model


def save_pretrained(model, folder, *parts):
    """Write what transformers' AutoModels read, and what `parts` save, such as a tokenizer."""
    config, params = model.config, checkpoint_names(model)
    weights = {name: common.to_host(param[...]) for name, param in params.items()}
    weights = {name: w if "_embeddings." in name else w.T for name, w in weights.items()}
    weights[WORDS] = weights[WORDS][: config.vocab_size]
    kind = {"mlm": "ForMaskedLM", "classify": "ForSequenceClassification", None: "Model"}[model.head]
    kind = ("MegatronBert" if is_pre_norm(config) else "Bert") + kind
    common.write_pretrained(folder, weights, config, kind, *parts)


# ---- training ----


def loss_sum(model, batch, key=None):
    """Weighted sums {nats, hits, count} over targets: tokens at positions (B, M), else classes (B,)."""
    keys = (None, None) if key is None else jax.random.split(key)
    hidden = model(batch["tokens"], batch.get("lengths"), key=keys[0])  # without lengths nothing is padding
    if "positions" in batch:
        hidden = hidden.astype(jnp.float32)  # so that no gradient is scattered in bfloat16
        hidden = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)  # (B, M, C)
        logits = model.mlm_logits(hidden)
    else:
        logits = model.class_logits(hidden, keys[1])
    targets, weights = batch["targets"], batch["weights"]
    # a sum in place of a look-up: its gradient is no scatter into all the logits
    picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    hits = jnp.argmax(logits, axis=-1) == targets
    return dict(nats=jnp.sum(nats * weights), hits=jnp.sum(hits * weights), count=jnp.sum(weights))


def make_schedule(cfg):
    """Linear warm-up, then a line down to min_lr; with `cooldown` a plateau before it (arXiv 2405.18392)."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    fall = min(max(1, round((cfg.cooldown or 1) * steps)), steps - warm)
    up, down = (cfg.lr / (warm + 1), cfg.lr, warm), (cfg.lr, cfg.min_lr, fall)
    parts = optax.linear_schedule(*up), optax.constant_schedule(cfg.lr), optax.linear_schedule(*down)
    return optax.join_schedules(parts, [warm, steps - fall])


def make_optimizer(cfg, schedule):
    """AdamW with RoBERTa's betas; or Muon (Jordan 2024) inside, of AdamW's update size (arXiv 2502.16982)."""
    decayed = partial(jax.tree.map, lambda p: p.ndim >= 2)  # matrices and embeddings, not biases and norms
    rule = optax.adamw(schedule, b1=0.9, b2=0.98, eps=1e-6, weight_decay=cfg.weight_decay, mask=decayed)
    if cfg.optimizer == "muon":
        muon = optax.contrib.muon(schedule, weight_decay=cfg.weight_decay, consistent_rms=0.2)
        kind = lambda path, p: "hidden" if path[1].key == "encoder" and p.ndim == 2 else "rest"
        kinds = partial(jax.tree_util.tree_map_with_path, kind)
        rule = optax.partition({"hidden": muon, "rest": rule}, kinds)
    # of the same form without, so that a run can go on with another --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    return optax.chain(clip, rule)


def make_train_step(graphdef, state, cfg, schedule, mask):
    """jit: (state, batch, key of this step) -> (state, metrics). The state is donated; `mask` draws masks."""
    shardings, accum = jax.tree.map(lambda x: x.sharding, state), common.microbatches(cfg)
    mesh = jax.tree.leaves(shardings)[0].mesh
    model_def = nnx.graphdef(nnx.merge(graphdef, state)[0])  # graphdef is of (model, optimizer)

    # each device sums the gradients of its own rows; XLA alone would sum over devices in every microbatch
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P(), check_vma=False)
    def gradients(params, batch, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        # of all devices and microbatches: a target weighs the same in any
        total = jnp.maximum(jax.lax.psum(jnp.sum(batch["weights"]), "data"), 1)
        # (rows of this device, ...) -> (accum, rows of a microbatch, ...)
        batches = jax.tree.map(lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch)

        def add_microbatch(sums, batch_and_key):
            batch, key = batch_and_key
            loss_fn = lambda params: loss_sum(nnx.merge(model_def, params), batch, key)["nats"] / total
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(params)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        loss_and_grads, _ = jax.lax.scan(add_microbatch, zeros, (batches, jax.random.split(key, accum)))
        return jax.lax.psum(loss_and_grads, "data")

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch, key):
        model, optimizer = nnx.merge(graphdef, state)
        mask_key, dropout_key = jax.random.split(key)
        batch = mask(mask_key, batch)  # all rows at once: the masks are the same with any accum
        loss, grads = gradients(nnx.state(model), batch, dropout_key)
        metrics = {"loss": loss, "lr": schedule(optimizer.step[...]), "grad_norm": optax.global_norm(grads)}
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    return train_step


def make_evaluate(graphdef, rows, batch_size, mesh):
    """state -> {"val_loss", "val_acc"}, means over the targets of the rows {name: (N, ...)}."""
    n = len(rows["tokens"])
    rows = {name: np.resize(x, (n + -n % batch_size, *x.shape[1:])) for name, x in rows.items()}
    rows["weights"][n:] = 0  # of the rows that fill up the last batch
    eval_step = jax.jit(lambda state, batch: loss_sum(nnx.merge(graphdef, state)[0], batch))

    def evaluate(state):
        sums = []
        for i in range(0, n, batch_size):
            batch = {name: x[i : i + batch_size] for name, x in rows.items()}
            sums.append(eval_step(state, common.shard_batch(mesh, batch, whole=True)))
        nats, hits, count = (math.fsum(part[name] for part in sums) for name in ("nats", "hits", "count"))
        return {"val_loss": nats / count, "val_acc": hits / count}

    return evaluate


# ---- fill-mask, embeddings ----

forward = nnx.jit(BERT.__call__)


def fill_mask(model, tokenizer, texts, k=5):
    """For each [MASK] in each text: the k likeliest [(probability, text with that token in its place)]."""
    texts = [text.replace("[MASK]", tokenizer.mask_token) for text in texts]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]  # `encode` takes "[MASK]" for text
    longest, positions = max(map(len, rows)) + 2, model.config.max_position_embeddings
    expect(longest <= positions, f"--prompt: {longest} tokens, and there are {positions} positions")
    for text, row in zip(texts, rows):
        expect(tokenizer.mask_token_id in row, f"--prompt {text!r}: holds no [MASK]")
    tokens, lengths = frame(tokenizer, rows, longest)
    masks = np.argwhere(tokens == tokenizer.mask_token_id)  # (M, 2): row, place
    logits = model.mlm_logits(forward(model, tokens, lengths)[*masks.T])
    scores, ids = jax.lax.top_k(jax.nn.softmax(logits), k)
    fills = []
    for (row, place), probabilities, candidates in zip(masks, scores.tolist(), ids.tolist()):
        before, after = rows[row][: place - 1], rows[row][place:]  # without [CLS]
        filled = [tokenizer.decode([*before, token, *after]) for token in candidates]
        fills.append([*zip(probabilities, filled)])
    return fills


def embed_options(cfg):
    """Arguments of `embed`: --pooling, and what the sentence-transformers files of --init-from say."""
    folder = common.snapshot(cfg.init_from, "--init-from", ["*.json"])
    if not (folder / "modules.json").exists():
        return dict(pooling=cfg.pooling or "mean")
    modules, settings = json.loads((folder / "modules.json").read_text()), {}
    kinds = ", ".join(module["type"].rpartition(".")[2] for module in modules)
    known = kinds in ("Transformer, Pooling", "Transformer, Pooling, Normalize") and not modules[0]["path"]
    expect(known, f"modules.json has {kinds}; only Transformer at the top, Pooling and Normalize are known")
    files = [*folder.glob("sentence_*_config.json")]  # of bert, distilbert, ...
    files += [*folder.glob("config_sentence_transformers.json"), folder / modules[1]["path"] / "config.json"]
    for file in files:
        settings |= json.loads(file.read_text())
    limit = settings.get("max_seq_length")
    expect(limit is None or (type(limit) is int and limit > 2), f"max_seq_length is {limit}")

    flags = [name for name, value in settings.items() if value is True and name.startswith("pooling_mode_")]
    flagged = "+".join(re.sub("pooling_mode_|_tokens?$", "", name) for name in flags)
    mode = cfg.pooling or settings.get("pooling_mode") or flagged or "mean"
    expect(mode in ("mean", "cls"), f"pooling is {mode}, only mean or cls; see --pooling")
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    expect(not default or default in prompts, f"default_prompt_name {default} is not in its prompts")
    prompt = prompts[default] if default else ""
    followed = "max_seq_length do_lower_case prompts default_prompt_name include_prompt similarity_fn_name "
    followed += "word_embedding_dimension embedding_dimension pooling_mode transformer_task modality_config "
    followed += "module_output_name model_type __version__"
    others = [name for name in settings if settings[name] and name not in [*followed.split(), *flags]]
    others += ["include_prompt"] if prompt and not settings.get("include_prompt", True) else []
    if cfg.mteb:
        others += ["prompts"] if any(prompts.values()) else []
        others += ["similarity_fn_name"] if settings.get("similarity_fn_name") not in (None, "cosine") else []
    expect(not others, f"{', '.join(others)}: cannot be followed")
    options = dict(max_length=limit, lower=settings.get("do_lower_case", False))
    return options | dict(pooling=mode, unit="Normalize" in kinds, prompt=prompt)


def embed(model, tokenizer, texts, *, pooling="mean", unit=True, max_length=None, lower=False, prompt=""):
    """Vectors (N, C) of `prompt` + text, cut at max_length tokens: the mean over all, or what is at [CLS]."""
    longest = min(model.config.max_position_embeddings, max_length or tokenizer.model_max_length)
    texts = [(prompt + text).lower() if lower else prompt + text for text in texts]
    rows = encode(tokenizer, texts, special=True)
    if cut := sum(len(row) > longest - 2 for row in rows):
        print(f"{cut} of {len(texts)} texts are longer than {longest} tokens and were cut")
    order = np.argsort([-len(row) for row in rows], kind="stable")  # the longest first: memory fails at once
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for i in range(0, len(order), 32):
        some = np.resize(order[i : i + 32], 32)  # the last batch repeats some
        width = min(longest, max(16, 1 << (len(rows[some[0]]) + 1).bit_length()))  # few sizes to compile
        tokens, lengths = frame(tokenizer, [rows[j] for j in some], width)
        hidden = forward(model, tokens, lengths).astype(jnp.float32)  # (B, T, C)
        is_text = (np.arange(width) < lengths[:, None])[..., None]
        vectors[some] = hidden[:, 0] if pooling == "cls" else jnp.sum(hidden * is_text, 1) / lengths[:, None]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if unit else vectors


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    common.check(cfg, ["val_docs", "shuffle_buffer", "n_layer", "n_head", "n_embd"])
    expect(cfg.n_embd % cfg.n_head == 0, f"--n-embd {cfg.n_embd}: must be divisible by --n-head {cfg.n_head}")
    expect(cfg.seq_len > 2, f"--seq-len {cfg.seq_len}: must hold [CLS], [SEP] and a token")
    expect(0 < cfg.mask_share < 1, f"--mask-share {cfg.mask_share}: must be in (0, 1)")
    is_bpe = (cfg.tokenizer or "").startswith("bpe:")
    expect(not (is_bpe and cfg.init_from), "--tokenizer bpe:N: is trained anew; --init-from knows its own")
    uses = cfg.prompt or cfg.embed or cfg.mteb
    expect(not (uses and cfg.steps), "--prompt, --embed and --mteb: need a finished model and --steps 0")


def use(cfg):
    """What --prompt, --embed and --mteb ask of the model in --init-from -> {task of mteb: main score}."""
    if cfg.embed:
        out = Path(cfg.embed).with_suffix(".npy")
        is_text = Path(cfg.embed).is_file() and out != Path(cfg.embed)
        expect(is_text, f"--embed {cfg.embed}: no such text file")
        expect(cfg.overwrite or not out.exists(), f"--embed: {out} exists; --overwrite to replace it")
    with common.blame(f"--init-from {cfg.init_from}"):
        options = embed_options(cfg) if cfg.embed or cfg.mteb else {}
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.init_from)
    model = build(cfg, tokenizer, "mlm" if cfg.prompt else None)
    if cfg.prompt:
        fills = fill_mask(model, tokenizer, cfg.prompt)
        print("\n\n".join("\n".join(f"{p:6.1%}  {text!r}" for p, text in best) for best in fills))
    if cfg.embed:
        texts = next(common.read_texts([cfg.embed], "text"))["text"].removesuffix("\n").split("\n")
        vectors = embed(model, tokenizer, texts, **options)
        np.save(out, vectors)
        print(f"{len(vectors):,} vectors of {vectors.shape[1]} are in {out}")
    if not cfg.mteb:
        return {}

    import mteb
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"name": f"nanoflax/{Path(cfg.init_from).resolve().name}"})

        def encode(self, inputs, **_):
            return embed(model, tokenizer, [text for batch in inputs for text in batch["text"]], **options)

    with common.blame("--mteb"):  # a name that it does not know, or what comes of a download
        tasks = mteb.get_tasks(tasks=[*cfg.mteb])
        for task in tasks:
            task.load_data()
    cache = mteb.ResultCache(cfg.out_dir or "out/mteb")  # of all details
    results = mteb.evaluate(Encoder(), tasks, cache=cache, overwrite_strategy="always").task_results
    scores = {result.task_name: float(result.get_score()) for result in results}
    print(*(f"{name} {100 * score:.2f}" for name, score in scores.items()), sep="\n")
    return scores


def build(cfg, tokenizer, head, classes=None):
    """The model to start from: that of --init-from, whose sizes it has, or a new one."""
    V, options = max(tokenizer.get_vocab().values()) + 1, dict(head=head, dtype=cfg.dtype, remat=cfg.remat)
    rates = "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout"
    fields = dict.fromkeys(rates.split(), cfg.dropout or 0.0)
    ids, sep, cls = tokenizer("a")["input_ids"], tokenizer.sep_token_id, tokenizer.cls_token_id
    if [*ids[:1], *ids[-1:]] != [cls, sep]:  # a new model has its rows so, and texts when it is used
        name = cfg.tokenizer or cfg.init_from
        expect(not cfg.init_from, f"--tokenizer {name}: does not make [CLS] text [SEP] of a text")
        frame_of = BertProcessing((tokenizer.sep_token, sep), (tokenizer.cls_token, cls))
        tokenizer.backend_tokenizer.post_processor = frame_of
    if cfg.init_from:
        options |= dict(classes=classes, seed=cfg.seed if cfg.steps else None)
        with common.blame(f"--init-from {cfg.init_from}"):
            model = from_pretrained(cfg.init_from, **options, **({} if cfg.dropout is None else fields))
        known = model.config.vocab_size
        expect(known >= V, f"--tokenizer: ids up to {V - 1}, and {cfg.init_from} knows {known}")
        return model
    fields |= dict(num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, hidden_size=cfg.n_embd)
    fields |= dict(intermediate_size=4 * cfg.n_embd, max_position_embeddings=cfg.seq_len, vocab_size=V)
    fields |= common.label_names(classes) if classes else {}
    kind = MegatronBertConfig if cfg.pre_norm else BertConfig
    config = kind(pad_token_id=tokenizer.pad_token_id, **fields)
    return nnx.jit(lambda: BERT(config, rngs=nnx.Rngs(cfg.seed), **options))()


def prepare(cfg, sources, roles, tokenizer_name):
    """(tokenizer, make_rows for the stream, rows to validate on, how a step masks a batch with its key)."""
    (held_out, documents), T = common.hold_out_texts(cfg, sources, roles), cfg.seq_len
    if cfg.task == "mlm":
        tokenizer = load_tokenizer(tokenizer_name, documents)
        hide = partial(mask_tokens, tokenizer=tokenizer, share=cfg.mask_share)
        tokens = np.concatenate(encode(tokenizer, held_out, [tokenizer.sep_token_id]))[:-1]
        tokens, lengths = frame(tokenizer, [tokens[i : i + T - 2] for i in range(0, len(tokens), T - 2)], T)
        val_rows = jax.device_get(jax.jit(hide)(jax.random.key(1), tokens)) | dict(lengths=lengths)
        make_rows = partial(pack, tokenizer, {*held_out}, T)
        return tokenizer, make_rows, val_rows, lambda key, batch: hide(key, batch["tokens"])
    texts, labels = zip(*held_out)
    expect(len({*labels}) > 1 or not cfg.steps, f"--val-docs: all are of class {labels[0]}; give --val-data")
    if not sources[0].classes:  # 0, 1, ... up to the largest seen; a label beyond them is a bad record
        documents = [*documents]
        n = 1 + max(label for _, label in [*held_out, *documents])
        expect(n <= 100_000, f"--label-column: a label is {n - 1}; expected numbers of classes, 0, 1, ...")
        for source in sources:
            source.classes = [str(i) for i in range(n)]
    tokenizer = load_tokenizer(tokenizer_name, (text for text, _ in documents))
    rows = label_rows(tokenizer, (), T, dict(text=texts, label=labels), np.random.default_rng(0))
    val_rows = {column: np.stack([row[column] for row in rows]) for column in rows[0]}
    return tokenizer, partial(label_rows, tokenizer, {*texts}, T), val_rows, lambda key, batch: batch


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or use. Raises UsageError."""
    check(cfg)
    if cfg.prompt or cfg.embed or cfg.mteb:
        return use(cfg)
    key, mesh, T = jax.random.key(cfg.seed), common.make_mesh(), cfg.seq_len

    # data: rows to validate on, the tokenizer, and what makes rows to train on
    roles = {"text": cfg.text_column} | ({"label": cfg.label_column} if cfg.task == "classify" else {})
    sources = common.open_data(cfg, roles)
    tokenizer_name = cfg.out_dir if cfg.resume else cfg.tokenizer or cfg.init_from or "bpe:2048"
    tokenizer, make_rows, val_rows, mask = prepare(cfg, sources, roles, tokenizer_name)
    n_rows, accum = len(val_rows["tokens"]), common.microbatches(cfg)
    expect(val_rows["weights"].any(), f"--val-docs {cfg.val_docs}: hold no token to predict")

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model, schedule = build(cfg, tokenizer, cfg.task, sources[0].classes), make_schedule(cfg)
    config = model.config
    positions = tokenizer.model_max_length = config.max_position_embeddings
    expect(positions >= T, f"--seq-len {T}: at most {positions} with {cfg.init_from}")
    graphdef, state = nnx.split((model, nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, cfg, schedule, mask)
    evaluate = make_evaluate(graphdef, val_rows, cfg.batch_size // accum, mesh)
    if not cfg.steps:
        result = evaluate(state)
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {n_rows} rows")
        return result

    # the run directory, its newest checkpoint, and the stream from where that was
    unchanged = {"validation rows": common.digest({name: x.tolist() for name, x in val_rows.items()})}
    unchanged["tokenizer"] = common.digest(tokenizer.backend_tokenizer.to_str())
    run = common.Run("bert", cfg, sources, unchanged, FREE, [tokenizer, config])
    state = run.restore(state)
    batches = run.open_batches(sources, make_rows)

    L, C, V, kind = config.num_hidden_layers, config.hidden_size, config.vocab_size, config.model_type
    size = lambda module: sum(p.size for p in jax.tree.leaves(nnx.state(module)))
    # FLOPs to train on a token: 6 a parameter of the encoder, and of the head for masked ones, and 12 L C T
    head = cfg.mask_share * (C + V) * C if cfg.task == "mlm" else 0
    flops = 6 * (size(model.bert.encoder) + head) + 12 * L * C * T
    print(f"model      {kind}, {size(model) / 1e6:.1f} M parameters, {cfg.dtype}, on {run.info['devices']}")
    print(f"data       {' '.join((*cfg.data, *cfg.data_name))}, validation on {n_rows} rows")
    print(f"tokenizer  {tokenizer_name}, {len(tokenizer):,} tokens")
    size_of_step = f"{cfg.batch_size} rows x {T} = {cfg.batch_size * T:,} tokens"
    print(f"step       {size_of_step}, {accum} microbatches, {cfg.optimizer}")
    del model  # with --fsdp, or the first device would keep it whole

    with run.training(batches, 128, "tokens", cfg.batch_size * T, flops):
        for step, batch in run.steps():
            batch = common.shard_batch(mesh, batch)
            state, metrics = train_step(state, batch, jax.random.fold_in(key, step))
            run.log(state, metrics)
            if run.due(cfg.eval_every):
                with run.pause():
                    run.flush(evaluate(state))
    save_pretrained(nnx.merge(graphdef, state)[0], run.dir, tokenizer)
    return run.end()


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
