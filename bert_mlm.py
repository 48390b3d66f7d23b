"""BERT (Devlin et al. 2018) pre-trained from a stream of text by masked LM, then put to use, in one file.

    python bert_mlm.py --steps 1000         # offline: a small BERT on the source of Python's standard library
    python bert_mlm.py --preset bert-base   # BERT-base on FineWeb-Edu, streamed from the Hugging Face hub
    python bert_mlm.py --steps 0 --init-from out/bert-001 --prompt "for i in [MASK](10):"    # fill the mask
    python bert_mlm.py --preset classify --data reviews.csv --init-from bert-base-uncased    # fine-tune

Documents are tokenised as they arrive, joined by [SEP] and packed into rows [CLS] ... [SEP] without padding.
Masks are drawn on the device, the same number in every row, so that the head works on these positions alone.
A run killed at any moment goes on with --resume, bit for bit. When it ends, its directory is a Hugging Face
model folder.

Measured on two CPU cores: after the first command masked tokens on held-out documents have loss 3.27 and are
guessed with accuracy 0.377.

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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig, MegatronBertConfig, PreTrainedTokenizerFast


@dataclasses.dataclass
class Config(common.RunConfig):
    preset: Literal["stdlib", "bert-mini", "bert-base", "bert-large", "classify"] = (
        "stdlib"  # a recipe: other defaults for the flags below
    )
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
    n_layer: int = 4  # blocks, L
    n_head: int = 4  # attention heads, H
    n_embd: int = 128  # width, C
    pre_norm: bool = True  # norms before each block and at the end (Megatron's BERT): needs less warm-up
    dropout: float = 0.0  # on embeddings, attention and residual branches; 0 for pre-training
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 1_000  # optimizer steps; 0 only evaluates, fills masks or embeds, from init_from
    batch_size: int = 128  # rows a step, over all devices
    device_rows: int = 128  # rows that a device takes at once, to fit in memory
    accum: int | None = None  # microbatches in a step; else as few as device_rows allows
    mask_share: float = 0.15  # of a row's tokens to predict
    optimizer: Literal["adamw", "muon"] = "muon"  # muon is for the hidden matrices; the rest stays on adamw
    lr: float = 1e-2  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end, after a straight line
    cooldown: float = 0.0  # share of the steps in which a constant rate falls; 0 falls from the warm-up on
    warmup_steps: int = 50  # linear, up to lr
    weight_decay: float = 0.01  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, masks and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    # use, with --steps 0
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # text with a [MASK]; repeatable
    embed: str | None = None  # text file to embed, a text a line, into an .npy beside it
    mteb: tuple[str, ...] = ()  # tasks of the mteb package to evaluate embeddings on, as in STSBenchmark
    pooling: Literal["mean", "cls"] | None = None  # a text's vector; else as in init_from's folder, or mean


# batch, rates and the 6 % of warm-up of MosaicBERT (arXiv 2312.17482); 19,073 steps are 10 B tokens
HUB = dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="bert-base-uncased")
HUB |= dict(shuffle_buffer=10_000, val_docs=1_000, seq_len=128, batch_size=4_096, steps=19_073)
HUB |= dict(pre_norm=False, optimizer="adamw", warmup_steps=1_150, dtype="bfloat16")
TUNE = dict(task="classify", optimizer="adamw", lr=1e-4, seq_len=128, batch_size=32, val_docs=500)
PRESETS = {
    "stdlib": {},
    "bert-mini": HUB | dict(n_layer=4, n_head=4, n_embd=256, lr=1e-3, device_rows=2_048),
    "bert-base": HUB | dict(n_layer=12, n_head=12, n_embd=768, lr=5e-4, device_rows=512),
    "bert-large": HUB | dict(n_layer=24, n_head=16, n_embd=1024, lr=2e-4, device_rows=128, remat=True),
    "classify": TUNE,
}

# these may change when a run goes on, beside those of RunConfig: they do not change what its checkpoint means
FREE = "steps device_rows accum lr min_lr cooldown warmup_steps weight_decay grad_clip dropout remat"


# ---- data ----


def load_tokenizer(name, documents=()):
    """The tokenizer called `name`: a hub id, a folder, or "bpe:N", trained on `documents`."""
    kind, _, size = name.partition(":")
    if kind != "bpe":
        tokenizer = common.load_tokenizer(name)
        for role in ("mask_token", "cls_token", "sep_token", "pad_token"):
            found = getattr(tokenizer, role) is not None
            expect(found, f"--tokenizer {name}: has no {role}; BERT needs one")
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

    The documents are joined, and cut into rows from a random start: nothing is padded. Fewer than 2 length
    tokens are given up, at the two ends.
    """
    texts = [text for text in records["text"] if text not in held_out]
    tokens = np.concatenate([np.zeros(0, np.int32), *encode(tokenizer, texts, [tokenizer.sep_token_id])])
    inner = length - 2
    start = rng.integers(min(inner, max(len(tokens) - inner, 0) + 1))
    tokens = tokens[start : start + (len(tokens) - start) // inner * inner]
    rows, _ = frame(tokenizer, rng.permutation(tokens.reshape(-1, inner)), length)
    return [{"tokens": row} for row in rows]


def label_rows(tokenizer, held_out, length, records, rng):
    """Rows {"tokens": (length,), "lengths", "targets", "weights"} of {"text": list, "label": list}, shuffled.

    A text that is held out is left out, a longer one cut, a shorter one padded.
    """
    pairs = [pair for pair in zip(records["text"], records["label"]) if pair[0] not in held_out]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    tokens, lengths = frame(tokenizer, encode(tokenizer, [text for text, _ in pairs]), length)
    columns = tokens, lengths, np.array([label for _, label in pairs], np.int32), np.ones(len(pairs), "f4")
    return [dict(zip(("tokens", "lengths", "targets", "weights"), row)) for row in zip(*columns)]


# ---- masking ----


def masking_rules(tokenizer):
    """What mask_tokens needs of a vocabulary: special (V,) bool, the ids of ordinary tokens, the mask's."""
    special = np.zeros(common.vocabulary_size(tokenizer), bool)
    special[tokenizer.all_special_ids] = True
    ordinary = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids})
    return dict(special=special, ordinary=np.array(ordinary, np.int32), mask=tokenizer.mask_token_id)


def mask_tokens(key, tokens, rules, *, share=0.15):
    """Draw what to predict of tokens (B, T) and hide it -> dict(tokens (B, T), and (B, M):
    positions, targets, weights).

    A row with n tokens that are not special gives exactly max(1, round(share n)) of them: 80 % become the
    mask, 10 % any ordinary token, 10 % stay (Devlin et al. 2018). M is that number for n = T; positions that
    a row has no use for weigh 0.
    """
    B, T = tokens.shape
    quotas = np.floor(share * np.arange(T + 1) + 0.5).astype(np.int32)
    quotas[1:] = np.maximum(quotas[1:], 1)
    M, where_key, how_key, token_key = int(quotas[T]), *jax.random.split(key, 3)
    special, ordinary = jnp.asarray(rules["special"]), jnp.asarray(rules["ordinary"])

    real = ~special[tokens]
    quota = jnp.asarray(quotas)[jnp.sum(real, axis=1, keepdims=True)]  # (B, 1)
    scores = jnp.where(real, jax.random.uniform(where_key, (B, T)), 2)
    positions = jnp.argsort(scores, axis=1)[:, :M]
    weights = (jnp.arange(M) < quota).astype(jnp.float32)  # (B, M)

    targets = jnp.take_along_axis(tokens, positions, axis=1)
    dice = jax.random.uniform(how_key, (B, M))
    random = ordinary[jax.random.randint(token_key, (B, M), 0, len(ordinary))]
    hidden = jnp.where(dice < 0.8, rules["mask"], jnp.where(dice < 0.9, random, targets))
    hidden = jnp.where(weights > 0, hidden, targets)
    tokens = jnp.put_along_axis(tokens, positions, hidden, axis=1, inplace=False)
    return dict(tokens=tokens, positions=positions, targets=targets, weights=weights)


# ---- model ----

gelu = partial(jax.nn.gelu, approximate=False)  # by erf; GPT-2's is the tanh one


class Linear(nnx.Linear):
    """nnx.Linear, but the bias is added in float32: bfloat16 cannot hold its gradient, a sum over tokens."""

    def __call__(self, x):
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return (y + self.bias[...]).astype(self.dtype)


class Embed(nnx.Embed):
    """nnx.Embed, but looked up in float32 and cast then, for the same reason: a token has many places."""

    def __call__(self, ids):
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.dtype)


def dense(fan_in, fan_out, config, dtype, rngs, scale=1.0):
    """A dense layer with BERT's init; its kernel is (in, out), the checkpoint's (out, in)."""
    init = nnx.initializers.normal(config.initializer_range * scale)
    return Linear(fan_in, fan_out, kernel_init=init, dtype=dtype, rngs=rngs)


def layer_norm(config, dtype, rngs):
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)


def dropout(x, rate, key):
    """Zero a share `rate` of x and scale up the rest; without a key, that is in evaluation, nothing."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def is_pre_norm(config):
    return config.model_type == "megatron-bert"


class Embeddings(nnx.Module):
    def __init__(self, config, dtype, rngs):
        init = nnx.initializers.normal(config.initializer_range)
        embed = partial(Embed, features=config.hidden_size, embedding_init=init, rngs=rngs)
        V = -(-config.vocab_size // 128) * 128  # whole tiles; the padding is never seen outside
        self.word_embeddings = embed(V, dtype=dtype)
        # float32 until they are added: the gradient of what is broadcast is a sum over rows
        self.position_embeddings = embed(config.max_position_embeddings, dtype="float32")
        self.token_type_embeddings = embed(config.type_vocab_size, dtype="float32")
        self.LayerNorm = None if is_pre_norm(config) else layer_norm(config, dtype, rngs)

    def __call__(self, tokens, token_types):
        token_types = jnp.zeros((1, 1), int) if token_types is None else token_types
        x = self.word_embeddings(tokens) + self.position_embeddings(jnp.arange(tokens.shape[1])[None])
        x = (x + self.token_type_embeddings(token_types)).astype(self.word_embeddings.dtype)
        return x if self.LayerNorm is None else self.LayerNorm(x)  # (B, T, C)


class SelfAttention(nnx.Module):
    def __init__(self, config, dtype, rngs):
        self.n_head, self.rate = config.num_attention_heads, config.attention_probs_dropout_prob
        project = partial(dense, config.hidden_size, config.hidden_size, config, dtype, rngs)
        self.query, self.key, self.value = project(), project(), project()

    def __call__(self, x, lengths, key):
        B, T, C = x.shape
        q, k, v = (f(x).reshape(B, T, self.n_head, -1) for f in (self.query, self.key, self.value))
        if key is not None and self.rate > 0:  # the fused kernels know no dropout
            scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
            seen = jnp.arange(T) < (T if lengths is None else lengths[:, None, None, None])
            scores = jnp.where(seen, scores / math.sqrt(q.shape[-1]), -jnp.inf)
            weights = dropout(jax.nn.softmax(scores), self.rate, key)
            y = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)
        else:
            options = dict(key_value_seq_lengths=lengths, implementation=common.attention_kernel(q))
            y = jax.nn.dot_product_attention(q, k, v, **options)
        return y.reshape(B, T, C)


class Layer(nnx.Module):
    """Attention and MLP; norms after each, or before each where the config is Megatron's."""

    def __init__(self, config, dtype, rngs):
        C, inner, pre = config.hidden_size, config.intermediate_size, is_pre_norm(config)
        self.pre_norm, self.rate = pre, config.hidden_dropout_prob
        norm = partial(layer_norm, config, dtype, rngs)
        # the checkpoint's names; pre-norm keeps the residual stream's variance (Radford et al. 2019)
        scale = 1 / math.sqrt(2 * config.num_hidden_layers) if pre else 1.0
        back = partial(dense, config=config, dtype=dtype, rngs=rngs, scale=scale)
        inside = {"self": SelfAttention(config, dtype, rngs), "output": nnx.Dict(dense=back(C, C))}
        self.attention = nnx.Dict(inside)
        self.intermediate = nnx.Dict(dense=dense(C, inner, config, dtype, rngs))
        self.output = nnx.Dict(dense=back(inner, C))
        if pre:
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

    `config`: a BertConfig of transformers, or MegatronBertConfig: pre-norm. `head`: mlm, classify or None.
    `dtype`: of the computation; parameters are float32.
    model(tokens (B, T) int32, lengths (B,), token_types (B, T)) -> hidden (B, T, C); what stands in a row
    beyond its length is padding. Dropout only where a key is given.
    """

    def __init__(self, config, *, head="mlm", dtype="float32", remat=False, rngs):
        self.config, self.head, self.remat = nnx.static(config), head, remat
        C, linear = config.hidden_size, partial(dense, config=config, dtype=dtype, rngs=rngs)
        layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.bert = nnx.Dict(embeddings=Embeddings(config, dtype, rngs), encoder=nnx.Dict(layer=layers))
        if is_pre_norm(config):
            self.bert.encoder.ln = layer_norm(config, dtype, rngs)
        if head == "mlm":
            transform = nnx.Dict(dense=linear(C, C), LayerNorm=layer_norm(config, dtype, rngs))
            bias = nnx.Param(jnp.zeros(config.vocab_size))
            self.cls = nnx.Dict(predictions=nnx.Dict(transform=transform, bias=bias))
        if head == "classify":
            self.bert.pooler = nnx.Dict(dense=linear(C, C))
            self.classifier = linear(C, config.num_labels)

    def __call__(self, tokens, lengths=None, token_types=None, key=None):
        n, rate = len(self.bert.encoder.layer), self.config.hidden_dropout_prob
        keys = [None] * (n + 1) if key is None else jax.random.split(key, n + 1)
        x = dropout(self.bert.embeddings(tokens, token_types), rate, keys[n])  # (B, T, C)
        for i, layer in enumerate(self.bert.encoder.layer):
            layer = jax.checkpoint(layer.__call__) if self.remat else layer
            x = layer(x, lengths, keys[i])
        return self.bert.encoder.ln(x) if is_pre_norm(self.config) else x

    def mlm_logits(self, hidden):
        """Logits (..., V) float32 of hidden states (..., C); the decoder is tied to the word embeddings."""
        head = self.cls.predictions
        x = head.transform.LayerNorm(gelu(head.transform.dense(hidden)))
        logits = self.bert.embeddings.word_embeddings.attend(x)[..., : self.config.vocab_size]
        return logits.astype(jnp.float32) + head.bias[...]

    def class_logits(self, hidden, key=None):
        """Logits (B, classes) float32 of hidden states (B, T, C), from the first token."""
        rate = getattr(self.config, "classifier_dropout", None)
        rate = self.config.hidden_dropout_prob if rate is None else rate
        pooled = dropout(jnp.tanh(self.bert.pooler.dense(hidden[:, 0])), rate, key)
        return self.classifier(pooled).astype(jnp.float32)


# ---- pretrained weights in and out ----

OF_HEADS = ("cls.", "classifier.", "bert.pooler.")
# tables that are one in the model; files have them under either name, or both
TIED = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
TIED |= {"cls.predictions.decoder.bias": "cls.predictions.bias"}


def is_kernel(name):
    """Whether the checkpoint holds it as (out, in): dense layers, but no embeddings."""
    return name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight", "classifier.weight"))


def read_weights(path):
    """(config, {name: array}) of a BERT, with our names and shapes. Raises UsageError for what is none."""
    config, stored, _ = common.read_pretrained((BertConfig, MegatronBertConfig), path)
    where, weights = f"--init-from {path}", {}
    followed = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size layer_norm_eps"
    followed += " hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings type_vocab_size"
    common.refuse_others(config, followed + " classifier_dropout chunk_size_feed_forward", where)
    supported = dict(position_embedding_type="absolute", problem_type="single_label_classification")
    for name, value in supported.items():
        asked = getattr(config, name, None)
        expect(asked in (None, value), f"{where}: {name} is {asked}, only {value} is supported")
    for name, w in stored.items():
        # the oldest files have gamma and beta, and bare encoders no prefix
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        name = "bert." * name.startswith(("embeddings.", "encoder.", "pooler.")) + name
        weights[name] = w.T if is_kernel(name) else w
    for twin, name in TIED.items():
        w = weights.pop(twin, None)
        same = w is None or np.array_equal(weights.setdefault(name, w), w)
        expect(same, f"{where}: {twin} is not {name}; only tied ones are supported")
    return config, weights


def from_pretrained(
    path, *, head="any", classes=None, new_head=False, dtype="float32", remat=False, seed=0, **overrides
):
    """The BERT of a hub id, a folder or a run directory; `overrides` change its config.

    `head`: mlm, classify, None, or any that the checkpoint has; with `new_head` one that it lacks is new. A
    classifier's outputs are put in the order of the names `classes`. A smaller max_position_embeddings keeps
    the first ones.
    """
    (config, weights), where = read_weights(path), f"--init-from {path}"
    config.update(overrides)
    if head == "any":
        marks = {"classifier.weight": "classify", "cls.predictions.transform.dense.weight": "mlm"}
        head = next((kind for name, kind in marks.items() if name in weights), None)
    if classes:
        theirs = common.class_names(config)
        order = common.match_classes(theirs, classes)
        others = f"its classes are {', '.join(theirs)}, and the data's {', '.join(classes)}"
        expect(order or new_head or "classifier.weight" not in weights, f"{where}: {others}")
        if order is None and "classifier.weight" in weights:
            print(f"head       new: {others}")
        for name in {"classifier.weight", "classifier.bias"} & {*weights}:
            w = weights.pop(name)
            weights |= {name: w[..., order]} if order else {}
        classes = theirs if order and all(map(str.isdecimal, classes)) else classes  # the data name none
        config.update(common.label_names(classes))
    create = lambda: BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed))
    model = nnx.jit(create)() if new_head else nnx.eval_shape(create)
    state, new = nnx.state(model), []
    for name, param in checkpoint_names(state).items():
        w = weights.pop(name, None)
        if w is None and name.startswith(OF_HEADS):
            new.append(name)
            continue
        expect(w is not None, f"{where}: {name} is missing")
        if name.endswith("position_embeddings.weight"):
            w = w[: config.max_position_embeddings]
        if name.endswith("word_embeddings.weight"):
            expect(len(w) == config.vocab_size, f"{where}: {name} has {len(w)} rows, not {config.vocab_size}")
            w = np.pad(w, [(0, -len(w) % 128), (0, 0)])
        expect(w.shape == param.shape, f"{where}: {name} is {w.shape}, expected {param.shape}")
        param.set_value(jnp.asarray(w.astype(np.float32)))
    unused = [name for name in weights if not name.startswith(OF_HEADS) and not name.endswith("position_ids")]
    expect(not unused, f"{where}: {unused[:1]} has no place in a BERT")
    lacks = f"{where}: has no {', '.join(new)}"
    expect(new_head or not new, f"{lacks}; needed for --task {head}")
    if new:
        print(f"{lacks}; drawn anew")
    nnx.update(model, state)
    return model


def save_pretrained(model, folder, tokenizer=None):
    """Write config.json, model.safetensors and the tokenizer: what transformers' AutoModels read."""
    weights = {name: common.to_host(p[...]) for name, p in checkpoint_names(model).items()}
    if jax.process_index():
        return
    weights = {name: np.ascontiguousarray(w.T) if is_kernel(name) else w for name, w in weights.items()}
    table = "bert.embeddings.word_embeddings.weight"
    weights[table] = weights[table][: model.config.vocab_size]
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    kind = {"mlm": "ForMaskedLM", "classify": "ForSequenceClassification", None: "Model"}[model.head]
    kind = ("MegatronBert" if is_pre_norm(model.config) else "Bert") + kind
    config = model.config.to_dict() | {"architectures": [kind], "dtype": "float32"}
    type(model.config).from_dict(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)


# ---- loss and optimizer ----


def loss_sum(model, batch, key=None):
    """Cross-entropy in nats, hits and the number of targets, each a sum by the targets' weights.

    Targets are tokens at `positions` (B, M), or without these the classes (B,).
    """
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
    """Linear warm-up, then a line down to min_lr at `steps`, or with `cooldown` a plateau before the line.

    The second is warmup-stable-decay (arXiv 2405.18392): until it cools down, `steps` makes no difference.
    """
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    fall = min(max(1, round(cfg.cooldown * steps)), steps - warm) if cfg.cooldown else steps - warm
    parts = [optax.linear_schedule(cfg.lr / (warm + 1), cfg.lr, warm), optax.constant_schedule(cfg.lr)]
    parts.append(optax.linear_schedule(cfg.lr, cfg.min_lr, fall))
    return optax.join_schedules(parts, [warm, steps - fall])


def make_optimizer(cfg, schedule):
    """AdamW, or Muon (Jordan 2024) on the hidden matrices with updates of AdamW's size (arXiv 2502.16982)."""
    decayed = partial(jax.tree.map, lambda p: p.ndim >= 2)  # matrices and embeddings, not biases and norms
    betas = dict(b1=0.9, b2=0.98, eps=1e-6)  # RoBERTa's (Liu et al. 2019)
    rule = optax.adamw(schedule, **betas, weight_decay=cfg.weight_decay, mask=decayed)
    if cfg.optimizer == "muon":
        muon = optax.contrib.muon(schedule, weight_decay=cfg.weight_decay, consistent_rms=0.2)
        kind = lambda path, p: "hidden" if path[1].key == "encoder" and p.ndim == 2 else "rest"
        kinds = partial(jax.tree_util.tree_map_with_path, kind)
        rule = optax.partition({"hidden": muon, "rest": rule}, kinds)
    # of the same form without, so that a run can go on with another --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    return optax.chain(clip, rule)


# ---- train and eval step ----


def make_train_step(graphdef, state, cfg, schedule, prepare):
    """jit: (state, batch, key of this step) -> (state, metrics). The state is donated.

    `prepare(key, batch)` makes of what the stream gave what loss_sum reads: it draws the masks.
    """
    shardings, accum = jax.tree.map(lambda x: x.sharding, state), common.microbatches(cfg)
    mesh = jax.tree.leaves(shardings)[0].mesh

    # a device differentiates the loss of its own rows; by itself XLA sums over devices in every microbatch
    @partial(jax.shard_map, mesh=mesh, in_specs=(None, P(), P("data"), P()), out_specs=P(), check_vma=False)
    def gradients(model_def, params, batch, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        batch = jax.tree.map(lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch)
        total = jax.lax.psum(jnp.sum(batch["weights"]), "data")  # a target weighs the same in any microbatch

        def loss_fn(params, batch, key):
            return loss_sum(nnx.merge(model_def, params), batch, key)["nats"] / jnp.maximum(total, 1)

        def microbatch(sums, batch):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(params, *batch)), None

        zeros, keys = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)), jax.random.split(key, accum)
        loss_and_grads, _ = jax.lax.scan(microbatch, zeros, (batch, keys))
        return jax.lax.psum(loss_and_grads, "data")

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch, key):
        model, optimizer = nnx.merge(graphdef, state)
        mask_key, key = jax.random.split(key)
        batch = prepare(mask_key, batch)  # all rows at once: the masks are the same with any accum
        loss, grads = gradients(*nnx.split(model), batch, key)
        metrics = {"loss": loss, "lr": schedule(optimizer.step[...]), "grad_norm": optax.global_norm(grads)}
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    return train_step


def make_eval_step(graphdef, mesh):
    """jit: (state, batch) -> the sums of loss_sum."""
    sums = lambda state, batch: loss_sum(nnx.merge(graphdef, state)[0], batch)
    return jax.jit(sums, out_shardings=NamedSharding(mesh, P()))


def evaluate(eval_step, state, rows, batch_size, mesh):
    """{"val_loss", "val_acc"} over every target of the rows {name: (N, ...)}, whatever the batch size."""
    n = len(rows["tokens"])
    short = -n % batch_size  # the last batch is filled up with rows that do not count
    rows = {k: np.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1)), mode="edge") for k, x in rows.items()}
    rows["weights"][n:] = 0
    sums = []
    for i in range(0, n, batch_size):
        batch = {k: x[i : i + batch_size] for k, x in rows.items()}
        sums.append(eval_step(state, common.shard_batch(mesh, batch, whole=True)))
    total = {k: float(np.sum([one[k] for one in jax.device_get(sums)], dtype=np.float64)) for k in sums[0]}
    return {"val_loss": total["nats"] / total["count"], "val_acc": total["hits"] / total["count"]}


# ---- fill-mask, embeddings ----


@partial(nnx.jit, static_argnums=5)
def _likeliest(model, tokens, lengths, row, at, k):
    logits = model.mlm_logits(model(tokens, lengths)[row, at])
    return jax.lax.top_k(jax.nn.softmax(logits), k)


def encode_prompts(tokenizer, texts, positions):
    """Token ids of each text, [MASK] being the mask; UsageError where there is none, or no room."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # `encode` takes "[MASK]" for text
    backend.no_truncation()
    backend.no_padding()
    texts = [text.replace("[MASK]", tokenizer.mask_token) for text in texts]
    rows = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    for text, row in zip(texts, rows):
        expect(tokenizer.mask_token_id in row, f"--prompt {text!r}: holds no [MASK]")
        n = len(row) + 2
        expect(n <= positions, f"--prompt: {n} tokens, and there are {positions} positions")
    return rows


def fill_mask(model, tokenizer, texts, k=5):
    """For each mask in each text: the k likeliest [(probability, text with that token in its place)]."""
    ids, out = encode_prompts(tokenizer, texts, model.config.max_position_embeddings), []
    tokens, lengths = frame(tokenizer, ids, max(map(len, ids)) + 2)
    masks = np.argwhere(tokens == tokenizer.mask_token_id)
    p, best = map(common.to_host, _likeliest(model, tokens, lengths, *masks.T, k))
    for (row, at), probabilities, candidates in zip(masks, p.tolist(), best.tolist()):
        before, after = ids[row][: at - 1], ids[row][at:]
        filled = [tokenizer.decode([*before, token, *after]) for token in candidates]
        out.append(list(zip(probabilities, filled)))
    return out


def embed_options(cfg):
    """What `embed` is to do by --pooling and the sentence-transformers files in the folder of --init-from.

    Without such files: the mean, unit vectors. Raises UsageError for what embed cannot do.
    """
    folder, where = common.snapshot(cfg.init_from, "--init-from", ["*.json"]), f"--init-from {cfg.init_from}"
    read = lambda file: json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    modules, limits = read("modules.json"), read("sentence_bert_config.json")
    if not modules:
        return dict(pooling=cfg.pooling or "mean")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    known = kinds[:2] == ["Transformer", "Pooling"] and kinds[2:] in ([], ["Normalize"])
    only = "only Transformer, Pooling and Normalize are supported"
    expect(known and not modules[0]["path"], f"{where}: modules.json has {', '.join(kinds)}; {only}")
    followed = "max_seq_length do_lower_case transformer_task modality_config module_output_name"
    others = [name for name, value in limits.items() if value and name not in followed.split()]
    expect(not others, f"{where}: sentence_bert_config.json has {others[:1]}, which is not supported")
    pooled = {"pooling_mode_mean_tokens": True} | read(f"{modules[1]['path']}/config.json")
    modes = [re.fullmatch("pooling_mode_(.+?)(_tokens?)?", name) for name, on in pooled.items() if on is True]
    mode = cfg.pooling or pooled.get("pooling_mode") or "+".join(mode[1] for mode in modes if mode)
    expect(mode in ("mean", "cls"), f"{where}: pooling is {mode}, only mean or cls; see --pooling")
    about = read("config_sentence_transformers.json")
    prompts = about.get("prompts") or {}
    prompt = prompts.get(about.get("default_prompt_name"), "")
    inside = pooled.get("include_prompt", True) or not prompt
    expect(inside, f"{where}: include_prompt is false, which is not supported with a default prompt")
    expect(not cfg.mteb or not any(prompts.values()), f"{where}: has prompts, which --mteb does not support")
    options = dict(pooling=mode, unit="Normalize" in kinds, prompt=prompt)
    return options | dict(max_length=limits.get("max_seq_length"), lower=limits.get("do_lower_case", False))


@partial(nnx.jit, static_argnums=(3, 4))
def _embed(model, tokens, lengths, pooling, unit):
    hidden = model(tokens, lengths).astype(jnp.float32)
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    x = hidden[:, 0] if pooling == "cls" else jnp.sum(hidden * real[..., None], 1) / lengths[:, None]
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if unit else x


def embed(
    model, tokenizer, texts, pooling="mean", batch_size=32, unit=True, max_length=None, lower=False, prompt=""
):
    """Vectors (N, C) float32, of length 1 if `unit`: the mean over [CLS] text [SEP], or what stands at [CLS].

    `prompt` goes before each text; longer texts than max_length, or the model's positions, are cut.
    """
    longest = min(model.config.max_position_embeddings, max_length or tokenizer.model_max_length)
    texts = [prompt + text for text in texts]
    rows = encode(tokenizer, [text.lower() for text in texts] if lower else texts)
    cut = sum(len(row) > longest - 2 for row in rows)
    if cut:
        print(f"{cut} of {len(texts)} texts are longer than {longest} tokens and were cut")
    order = np.argsort([-len(row) for row in rows], kind="stable")  # the longest first: memory fails at once
    out = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for i in range(0, len(order), batch_size):
        some = order[i : i + batch_size]
        filled = [rows[j] for j in np.resize(some, batch_size)]  # the last batch repeats some
        width = min(longest, max(16, 1 << (len(filled[0]) + 1).bit_length()))  # a power of 2: few to compile
        vectors = _embed(model, *frame(tokenizer, filled, width), pooling, unit)
        out[some] = np.asarray(vectors)[: len(some)]
    return out


def run_mteb(model, tokenizer, options, cfg):
    """Evaluate embeddings on tasks of the mteb package; {task: main score}, details under out_dir."""
    try:
        import mteb
        from mteb.models import ModelMeta
        from mteb.models.abs_encoder import AbsEncoder

        tasks = [mteb.get_task(name) for name in cfg.mteb]
        for task in tasks:
            task.load_data()
    except Exception as error:  # not installed, an unknown name, or what comes of a download
        raise common.UsageError(f"--mteb {' '.join(cfg.mteb)}: {common.in_brief(error)}") from error

    class Encoder(AbsEncoder):
        def __init__(self):
            about = dict(name=f"nanoflax/{Path(cfg.init_from).resolve().name}", revision=options["pooling"])
            self.mteb_model_meta = ModelMeta.create_empty(about | dict(embed_dim=model.config.hidden_size))

        def encode(self, inputs, **_):
            texts = [text for batch in inputs for text in batch["text"]]
            return embed(model, tokenizer, texts, **options)

    cache = mteb.ResultCache(cfg.out_dir or "out/mteb")
    found = mteb.evaluate(Encoder(), tasks, cache=cache, overwrite_strategy="always")
    return {result.task_name: float(result.get_score()) for result in found.task_results}


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    common.check(cfg, "val_docs", "shuffle_buffer", "n_layer", "n_head", "n_embd")
    expect(cfg.n_embd % cfg.n_head == 0, f"--n-embd {cfg.n_embd}: must be divisible by --n-head {cfg.n_head}")
    expect(cfg.seq_len > 2, f"--seq-len {cfg.seq_len}: must hold [CLS], [SEP] and a token")
    expect(0 <= cfg.cooldown <= 1, f"--cooldown {cfg.cooldown}: must be in [0, 1]")
    expect(0 < cfg.mask_share < 1, f"--mask-share {cfg.mask_share}: must be in (0, 1)")
    trains_only = not (cfg.prompt or cfg.embed or cfg.mteb)
    expect(trains_only or not cfg.steps, "--prompt, --embed and --mteb: need a finished model and --steps 0")


def use(cfg):
    """What --prompt, --embed and --mteb ask of the model in --init-from; the scores of mteb."""
    texts, out = [], cfg.embed and Path(cfg.embed).with_suffix(".npy")
    if cfg.embed:
        expect(Path(cfg.embed).is_file(), f"--embed {cfg.embed}: no such file")
        texts = Path(cfg.embed).read_text("utf-8-sig", errors="replace").removesuffix("\n").split("\n")
        taken = f"--embed {cfg.embed}: {out} exists; --overwrite to replace it"
        expect(cfg.overwrite or not out.exists(), taken)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.init_from)
    model, scores = build(cfg, tokenizer, "mlm" if cfg.prompt else None), {}
    if cfg.prompt:
        fills = fill_mask(model, tokenizer, cfg.prompt)
        print("\n\n".join("\n".join(f"{p:6.1%}  {text!r}" for p, text in best) for best in fills))
    options = embed_options(cfg) if cfg.embed or cfg.mteb else {}
    if cfg.embed:
        vectors = embed(model, tokenizer, texts, **options)
        np.save(out, vectors)
        print(f"{len(vectors):,} vectors of {vectors.shape[1]} are in {out}")
    if cfg.mteb:
        scores = run_mteb(model, tokenizer, options, cfg)
        print(*(f"{name} {100 * score:.2f}" for name, score in scores.items()), sep="\n")
    return scores


def build(cfg, tokenizer, head, classes=None):
    """The model to start from: that of --init-from, whose sizes it has, or a new one."""
    V, options = common.vocabulary_size(tokenizer), dict(head=head, dtype=cfg.dtype, remat=cfg.remat)
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    rates = dict.fromkeys(rates, cfg.dropout)
    if not cfg.init_from:
        sizes = dict(num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, hidden_size=cfg.n_embd)
        sizes |= dict(intermediate_size=4 * cfg.n_embd, max_position_embeddings=cfg.seq_len, vocab_size=V)
        kind = MegatronBertConfig if cfg.pre_norm else BertConfig
        if classes:
            sizes |= common.label_names(classes)
        config = kind(pad_token_id=tokenizer.pad_token_id, **sizes, **rates)
        return nnx.jit(lambda: BERT(config, rngs=nnx.Rngs(cfg.seed), **options))()
    options |= dict(classes=classes, new_head=cfg.steps > 0, seed=cfg.seed)
    model = from_pretrained(cfg.init_from, **options, **rates)
    wrong = f"--tokenizer {cfg.tokenizer or cfg.init_from}: ids up to {V - 1}, and {cfg.init_from} knows"
    expect(model.config.vocab_size >= V, f"{wrong} {model.config.vocab_size}")
    return model


def prepare_mlm(cfg, sources, tokenizer_name):
    """(tokenizer, make_rows for the stream, rows to validate on, what a step does to a batch first)."""
    texts, documents = common.hold_out_texts(cfg, sources)
    tokenizer, T = load_tokenizer(tokenizer_name, documents), cfg.seq_len
    tokens = np.concatenate(encode(tokenizer, texts, [tokenizer.sep_token_id]))[:-1]
    rows = [tokens[i : i + T - 2] for i in range(0, len(tokens), T - 2)]
    tokens, lengths = frame(tokenizer, rows, T)
    mask = partial(mask_tokens, rules=masking_rules(tokenizer), share=cfg.mask_share)
    val_rows = jax.device_get(jax.jit(mask)(jax.random.key(1), tokens))  # the same masks in every validation
    val_rows["lengths"] = lengths
    prepare = lambda key, batch: mask(key, batch["tokens"])
    return tokenizer, partial(pack, tokenizer, {*texts}, T), val_rows, prepare


def prepare_classify(cfg, sources, tokenizer_name, roles):
    """The same for texts with labels; the classes of sources that do not name them are 0, 1 ..."""
    held_out, documents = common.hold_out_texts(cfg, sources, roles)
    (texts, labels), documents = zip(*held_out), [*filter(None, documents)]
    classes = [str(i) for i in range(max(label for _, label in [*held_out, *documents]) + 1)]
    for source in sources:
        source.classes = source.classes or classes  # a label beyond them is a bad record
    alike = f"--val-docs {cfg.val_docs}: all are of class {labels[0]}"
    expect(len({*labels}) > 1 or not cfg.steps, f"{alike}; shuffle the data, or give --val-data")
    tokenizer = load_tokenizer(tokenizer_name, (text for text, _ in documents))
    rows = label_rows(tokenizer, (), cfg.seq_len, dict(text=texts, label=labels), np.random.default_rng(0))
    val_rows = {column: np.stack([row[column] for row in rows]) for column in rows[0]}
    full = np.sum(val_rows["lengths"] == cfg.seq_len)
    print(f"{full} of {len(texts)} texts to validate on fill --seq-len {cfg.seq_len}, or are cut there")
    make_rows = partial(label_rows, tokenizer, {*texts}, cfg.seq_len)
    return tokenizer, make_rows, val_rows, lambda key, batch: batch


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or use. Raises UsageError."""
    check(cfg)
    key, mesh, T = jax.random.key(cfg.seed), common.make_mesh(), cfg.seq_len
    if not cfg.steps and (cfg.prompt or cfg.embed or cfg.mteb):
        return use(cfg)

    # data: rows to validate on, the tokenizer, and what makes rows to train on
    roles = {"text": cfg.text_column} | ({"label": cfg.label_column} if cfg.task == "classify" else {})
    sources = common.open_data(cfg, roles)
    tokenizer_name = cfg.out_dir if cfg.resume else cfg.tokenizer or cfg.init_from or "bpe:2048"
    if cfg.task == "classify":
        prepared = prepare_classify(cfg, sources, tokenizer_name, roles)
    else:
        prepared = prepare_mlm(cfg, sources, tokenizer_name)
    tokenizer, make_rows, val_rows, prepare = prepared
    n_rows, accum = len(val_rows["tokens"]), common.microbatches(cfg)

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model, schedule = build(cfg, tokenizer, cfg.task, sources[0].classes), make_schedule(cfg)
    config, positions = model.config, model.config.max_position_embeddings
    expect(positions >= T, f"--seq-len {T}: {cfg.init_from} has {positions} positions")
    graphdef, state = nnx.split((model, nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, cfg, schedule, prepare)
    eval_step = make_eval_step(graphdef, mesh)
    validate = lambda state: evaluate(eval_step, state, val_rows, cfg.batch_size // accum, mesh)
    if not cfg.steps:
        result = validate(state)
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {n_rows} rows")
        return result

    # the run directory, its newest checkpoint, and the stream from where that was
    def write_folder(folder):
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)

    val_digest = common.digest(val_rows["tokens"].tolist())
    unchanged = common.unchanged(cfg, sources) | {"validation texts": val_digest}
    unchanged["tokenizer"] = common.digest(tokenizer.backend_tokenizer.to_str())
    run = common.Run("bert", cfg, unchanged, FREE.split(), write_folder)
    state = run.restore(state)
    batches = common.open_batches(cfg, sources, make_rows, run)

    size = lambda module: sum(p.size for p in jax.tree.leaves(nnx.state(module)))
    C = config.hidden_size
    # FLOPs to train on a token: 6 a parameter of the encoder, and of the head for masked ones, and 12 L C T
    flops = 6 * size(model.bert.encoder) + 12 * config.num_hidden_layers * C * T
    if cfg.task == "mlm":
        flops += 6 * cfg.mask_share * (C + config.vocab_size) * C
    kind = f"{type(config).__name__.removesuffix('Config')}, {size(model) / 1e6:.1f} M parameters"
    print(f"model      {kind}, {cfg.dtype}, on {run.info['devices']}")
    print(f"data       {' '.join((*cfg.data, *cfg.data_name))}, validation on {n_rows} rows")
    print(f"tokenizer  {tokenizer_name}, {len(tokenizer):,} tokens")
    size_of_step = f"{cfg.batch_size} rows x {T} = {cfg.batch_size * T:,} tokens"
    print(f"step       {size_of_step}, {accum} microbatches, {cfg.optimizer}")
    print(f"run        {run.dir}, from step {run.step} to {cfg.steps}", flush=True)
    del model  # with --fsdp, or the first device would keep it whole

    with run.training(batches, 128, "tokens", cfg.batch_size * T, flops):
        for step, batch in run.steps():
            batch = common.shard_batch(mesh, batch)
            state, metrics = train_step(state, batch, jax.random.fold_in(key, step))
            run.log(state, metrics)
            if run.due(cfg.eval_every):
                with run.pause():
                    result = validate(state)
                run.flush(result)
    save_pretrained(nnx.merge(graphdef, state)[0], run.dir, tokenizer)
    print(f"a Hugging Face model folder is in {run.dir}")
    return run.last


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
