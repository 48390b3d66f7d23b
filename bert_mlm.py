"""BERT (Devlin et al. 2018) pre-trained from a stream of text by masked LM, then put to use, in one file.

    python bert_mlm.py --steps 1000         # offline: a small BERT on the source of Python's standard library
    python bert_mlm.py --preset bert-base   # BERT-base on FineWeb-Edu, streamed from the Hugging Face hub
    python bert_mlm.py --steps 0 --init-from out/bert-001 --prompt "for i in [MASK](10):"    # fill the mask
    python bert_mlm.py --task classify --data reviews.csv --init-from bert-base-uncased      # fine-tune

Documents are tokenised as they arrive, joined by [SEP] and cut into rows of T - 2 tokens; each row is that
between [CLS] and [SEP], with no padding. Masks are drawn on the device, keyed by the step: the same number of
positions in every row, so that the head works on these alone. A run killed at any moment goes on with
--resume, bit for bit. When it ends, its directory is a Hugging Face model folder.

Measured on two CPU cores: after the first command masked tokens on held-out documents have loss 3.29 and are
guessed with accuracy 0.378; by the frequencies of tokens alone it would be 6.14 and 0.025.

Shapes: B batch, T tokens, M masked ones, C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import common
from common import expect, flag

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, MegatronBertConfig, PreTrainedTokenizerFast

# of the tokenizers we train; the mask takes the space before it, as the words it stands for do
SPECIAL = dict(pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask=AddedToken("[MASK]", lstrip=True))
SPECIAL = {f"{name}_token": token for name, token in SPECIAL.items()}


@dataclasses.dataclass
class Config:
    preset: Literal["stdlib", "bert-mini", "bert-base", "bert-large"] = (
        "stdlib"  # a recipe: other defaults for the flags below
    )
    task: Literal["mlm", "classify"] = "mlm"  # pre-train by masked LM, or fine-tune to classify texts
    # data
    data: tuple[str, ...] = ("stdlib",)  # stdlib (Python's source), synthetic, hub ids, files, URLs, folders
    data_name: tuple[str, ...] = ()  # configuration of each hub data set, as in sample-10BT; - for none
    data_weights: tuple[float, ...] = ()  # share of each --data in the rows; equal without
    text_column: str | None = None  # column with the text; found if there is one called text, or only one
    label_column: str | None = None  # column with the class, an int; found by its type or name
    val_data: tuple[str, ...] = ()  # to validate on; else data's validation or test split, or first documents
    val_docs: int | None = None  # documents to validate on, never trained on; 10, or 1,000 to classify
    tokenizer: str | None = None  # hub id, folder or bpe:N (trained); else init_from's, or bpe:2048
    seq_len: int | None = None  # tokens in a row, T; 32, or 128 to classify
    shuffle_buffer: int = 1_000  # documents whose rows are shuffled together
    retries: int = 8  # times in a row that a source that fails is opened again
    # model
    n_layer: int = 4  # blocks, L
    n_head: int = 4  # attention heads, H
    n_embd: int = 128  # width, C
    pre_norm: bool = True  # norms before each block and at the end (Megatron's BERT): needs less warm-up
    dropout: float = 0.0  # on embeddings, attention and residual branches; 0 for pre-training
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 1_000  # optimizer steps; 0 only evaluates, fills masks or embeds, from init_from
    batch_size: int | None = None  # rows a step, over all devices; 128, or 32 to classify
    accum: int = 1  # microbatches that a step is cut into, to fit in memory
    mask_share: float = 0.15  # of a row's tokens to predict
    whole_word: bool = False  # mask all pieces of a word together
    optimizer: Literal["adamw", "muon"] | None = None  # of hidden matrices; muon, or adamw to classify
    lr: float | None = None  # peak learning rate; 1e-2, or 1e-4 to classify
    min_lr: float = 0.0  # learning rate at the end, after a straight line
    warmup_steps: int = 50  # linear, from nothing to lr
    weight_decay: float = 0.01  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, masks and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    fsdp: bool = False  # shard parameters and optimizer state over the devices
    # run
    coordinator: str | None = None  # HOST:PORT of process 0 where several train together; auto asks jax
    num_processes: int | None = None  # how many these are; found with auto, SLURM and Open MPI
    process_id: int | None = None  # which of them this one is, from 0
    out_dir: str | None = None  # directory of the run; else the next free out/bert-001, out/bert-002, ...
    resume: bool = False  # go on with the run in out_dir, or with the newest one
    overwrite: bool = False  # delete the run in out_dir, or the file of --embed, and start again
    log_every: int = 10  # steps between two lines of metrics.jsonl
    eval_every: int = 250  # steps between two validations, which redraw curves.png and fill a mask
    eval_batches: int = 0  # batches of validation rows; 0 takes all of val_docs
    ckpt_every: int = 250  # steps between two checkpoints
    keep: int = 2  # newest checkpoints to keep
    profile: str | None = None  # directory for a trace of steps 10 to 15, for TensorBoard or XProf
    wandb: str | None = None  # project on Weights & Biases to log to
    # use
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # text with a [MASK]; repeatable
    embed: str | None = None  # text file to embed, a text a line, into an .npy beside it
    mteb: tuple[str, ...] = ()  # tasks of the mteb package to evaluate embeddings on, as in STSBenchmark
    pooling: Literal["mean", "cls"] = "mean"  # an embedding is the mean of a text's tokens, or its first


# batch, rates and the 6 % of warm-up of MosaicBERT (arXiv 2312.17482); 19,073 steps are 10 B tokens
HUB = dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="bert-base-uncased")
HUB |= dict(shuffle_buffer=10_000, val_docs=1_000, seq_len=128, batch_size=4_096, steps=19_073)
HUB |= dict(pre_norm=False, optimizer="adamw", warmup_steps=1_150, dtype="bfloat16")
# what is left open, by task
TASKS = dict(mlm=dict(val_docs=10, seq_len=32, batch_size=128, optimizer="muon", lr=1e-2))
TASKS |= dict(classify=dict(val_docs=1_000, seq_len=128, batch_size=32, optimizer="adamw", lr=1e-4))
PRESETS = {
    "stdlib": {},
    "bert-mini": HUB | dict(n_layer=4, n_head=4, n_embd=256, lr=1e-3, accum=2),
    "bert-base": HUB | dict(n_layer=12, n_head=12, n_embd=768, lr=5e-4, accum=8),
    "bert-large": HUB | dict(n_layer=24, n_head=16, n_embd=1024, lr=2e-4, accum=32, remat=True),
}


# ---- data ----


def load_tokenizer(name, documents=()):
    """The tokenizer called `name`: a hub id, a folder, or "bpe:N", trained on `documents`."""
    kind, _, size = name.partition(":")
    if kind != "bpe":
        files = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "config.json"]
        tokenizer = AutoTokenizer.from_pretrained(common.snapshot(name, "--tokenizer", files))
        expect(tokenizer.is_fast, f"--tokenizer {name}: has no fast form (tokenizer.json)")
        for role in ("mask", "cls", "sep", "pad"):
            found = getattr(tokenizer, f"{role}_token") is not None
            expect(found, f"--tokenizer {name}: has no {role} token; BERT needs one")
        return tokenizer
    size, special = int(size) if size.isdigit() else 0, list(SPECIAL.values())
    expect(size > 261, f"--tokenizer {name}: expected bpe:N with N above 261, as in bpe:2048")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes, spelled as GPT-2 spells them
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    how = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(islice(documents, 10_000), trainers.BpeTrainer(vocab_size=size, **how))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pieces = dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    tokenizer.post_processor = processors.TemplateProcessing(**pieces, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def encode(tokenizer, texts):
    """Token ids of each text, without special tokens: "[MASK]" inside a text is text."""
    backend, ids = tokenizer.backend_tokenizer, []
    if not backend.encode_special_tokens:  # set once: while another thread encodes, setting has to wait
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
    for i in range(0, len(texts), 64):  # an encoding takes 100 bytes a token, so never hold many
        chunk = backend.encode_batch_fast(texts[i : i + 64], add_special_tokens=False)
        ids += [np.array(encoding.ids, np.int32) for encoding in chunk]
    return ids


def encode_whole(tokenizer, texts, length):
    """[CLS] text [SEP] as token ids of each text, at most `length`, and which had to be cut: (N,) bool."""
    ids = encode(tokenizer, texts)
    ends = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    rows = [np.concatenate([ends[0], row[: length - 2], ends[1]]).astype(np.int32) for row in ids]
    return rows, np.array([len(row) > length - 2 for row in ids], bool)


def pad(rows, length, value):
    """Rows of any length as one array (N, length)."""
    out = np.full((len(rows), length), value, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def join(tokenizer, texts):
    """The texts' token ids, [SEP] after each, as one flat int array."""
    end = np.array([tokenizer.sep_token_id], np.int32)
    return np.concatenate([end[:0], *(part for ids in encode(tokenizer, texts) for part in (ids, end))])


def frame(rows, tokenizer):
    """[CLS] before and [SEP] after each row (n, T - 2) -> (n, T)."""
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    return np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), ends))


def pack(tokens, length, rng):
    """Cut a window's tokens (N,) into rows (n, length) from a random start, and shuffle them.

    Nothing is padded and no document is cut short; fewer than 2 length tokens are given up, at the two ends.
    """
    start = rng.integers(min(length, max(len(tokens) - length, 0) + 1))
    tokens = tokens[start : start + (len(tokens) - start) // length * length]
    return rng.permutation(tokens.reshape(-1, length))


def training_rows(source, tokenizer, cfg, held_out, epoch):
    """One epoch of `source`, but for the texts in `held_out`, as rows {"tokens": (T,) int}."""

    def pack_window(batch):
        texts = [text for text in batch["text"] if text not in held_out]
        rng = np.random.default_rng([cfg.seed, epoch, source.rank, batch["record"][0]])
        rows = frame(pack(join(tokenizer, texts), cfg.seq_len - 2, rng), tokenizer)
        return {"tokens": rows.astype(np.uint16 if len(tokenizer) < 1 << 16 else np.int32)}

    return source.map(epoch, cfg.seed, (pack_window, cfg.shuffle_buffer))


def validation_rows(tokenizer, texts, length):
    """Rows (N, length) int32 that hold every token of `texts` once; [PAD] fills the last."""
    tokens = join(tokenizer, texts)[:-1]
    rows = [tokens[i : i + length - 2] for i in range(0, len(tokens), length - 2)]
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    return pad([np.concatenate([ends[:1], row, ends[1:]]) for row in rows], length, tokenizer.pad_token_id)


def labelled_rows(source, tokenizer, cfg, held_out, epoch, *, classes, cut):
    """One epoch of `source` as rows {"tokens": (T,) int, padded; "lengths", "targets": int}.

    Texts of about one length come together, a batch of them at a time: it is as wide as its longest text.
    A window's last texts that fill no batch wait for another epoch. Texts cut at T are noted in `cut`.
    """

    def group_window(batch):
        for record, label in zip(batch["record"], batch["label"]):
            if label >= len(classes):
                source.skip(record, f"label is {label}, expected a class from 0 to {len(classes) - 1}")
        good = [label < len(classes) for label in batch["label"]]
        keep = [i for i, text in enumerate(batch["text"]) if good[i] and text not in held_out]
        rng = np.random.default_rng([cfg.seed, epoch, source.rank, batch["record"][0]])
        keep = rng.permutation(np.array(keep, int))
        B = cfg.batch_size
        keep = keep[: len(keep) // B * B or len(keep)]
        rows, too_long = encode_whole(tokenizer, [batch["text"][i] for i in keep], cfg.seq_len)
        cut.update(hash(batch["text"][i]) for i in keep[too_long])  # records have other numbers in each epoch
        lengths = np.array([len(row) for row in rows], np.int32)
        order = np.argsort(lengths, kind="stable")
        if len(order) > B:
            order = rng.permutation(order.reshape(-1, B)).reshape(-1)
        tokens = pad([rows[i] for i in order], cfg.seq_len, tokenizer.pad_token_id)
        labels = np.array([batch["label"][i] for i in keep[order]], np.int32)
        return {"tokens": tokens, "lengths": lengths[order], "targets": labels}

    return source.map(epoch, cfg.seed, (group_window, cfg.shuffle_buffer))


def bucket(length, longest):
    """The width that texts of this length are padded to, 16 24 32 48 64 ...: few are to be compiled."""
    width = 16
    while width < length:
        width = width * 3 // 2 if width.bit_count() == 1 else width * 4 // 3
    return min(width, longest)


def narrow(batch):
    """A batch without the padding that all its texts share."""
    return batch | {"tokens": batch["tokens"][:, : bucket(batch["lengths"].max(), batch["tokens"].shape[1])]}


# ---- masking ----


def masking_rules(tokenizer):
    """What mask_tokens asks of a vocabulary: (V,) bool each, special, begins a word, ends one; the ids of
    ordinary tokens; and that of the mask.

    WordPiece: what has no "##" begins a word. Else (byte-level BPE) words are runs of letters and digits, and
    the space before a word is its own: "Ġword".
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = np.zeros(len(tokens), bool)
    special[tokenizer.all_special_ids] = True
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "WordPiece":
        begins, ends = [not token.startswith("##") for token in tokens], [False] * len(tokens)
    else:
        # GPT-2 spells bytes of whitespace and control 256 to 289, and those of letters beyond ASCII otherwise
        letter = lambda c: c.isalnum() if c.isascii() else c != "▁" and not 256 <= ord(c) < 290
        begins = [not letter(token[:1]) for token in tokens]
        ends = [not letter(token[-1:]) for token in tokens]
    rules = dict(special=special, begins=special | begins, ends=special | ends)
    return rules | dict(ordinary=np.flatnonzero(~special).astype(np.int32), mask=tokenizer.mask_token_id)


def mask_tokens(key, tokens, rules, *, share=0.15, whole_word=False):
    """Draw what to predict of tokens (B, T) and hide it -> dict(tokens (B, T), and (B, M):
    positions, targets, weights).

    A row with n tokens that are not special gives exactly max(1, round(share n)) of them: 80 % become the
    mask, 10 % any ordinary token, 10 % stay (Devlin et al. 2018). M is that number for n = T; positions that
    a row has no use for weigh 0. With `whole_word` words are drawn in random order as long as the next fits
    whole, and one-token words fill up what is left: never more than that number, and fewer only when no
    one-token word is left unmasked.
    """
    B, T = tokens.shape
    quotas = np.floor(share * np.arange(T + 1) + 0.5).astype(np.int32)
    quotas[1:] = np.maximum(quotas[1:], 1)
    M, where_key, how_key, token_key = int(quotas[T]), *jax.random.split(key, 3)
    tables = {name: jnp.asarray(table) for name, table in rules.items()}

    real = ~tables["special"][tokens]
    quota = jnp.asarray(quotas)[jnp.sum(real, axis=1, keepdims=True)]  # (B, 1)
    begins = jnp.ones((B, T), bool)  # each token is a word
    if whole_word:
        before = jnp.pad(tables["ends"][tokens], ((0, 0), (1, 0)), constant_values=True)[:, :-1]
        begins = tables["begins"][tokens] | before
    word = jnp.cumsum(begins, axis=1) - 1
    scores = jnp.take_along_axis(jax.random.uniform(where_key, (B, T)), word, axis=1)
    order = jnp.argsort(jnp.where(real, scores, 2), axis=1)  # (B, T), stable, so that words stay together
    real, word = jnp.take_along_axis(real, order, axis=1), jnp.take_along_axis(word, order, axis=1)
    new = word[:, 1:] != word[:, :-1]
    first, last = (jnp.pad(new, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    # tokens up to the end of each one's word; it never falls, so that those within the quota come first
    upto = jax.lax.cummin(jnp.where(last, jnp.arange(1, T + 1), T), axis=1, reverse=True)
    chosen = real & (upto <= quota)
    spare = real & first & last & ~chosen
    chosen |= spare & (jnp.cumsum(spare, axis=1) <= quota - jnp.sum(chosen, axis=1, keepdims=True))
    weights, at = jax.lax.top_k(chosen.astype(jnp.float32), M)
    positions = jnp.take_along_axis(order, at, axis=1)  # (B, M)

    targets = jnp.take_along_axis(tokens, positions, axis=1)
    dice = jax.random.uniform(how_key, (B, M))
    ordinary = tables["ordinary"]
    random = ordinary[jax.random.randint(token_key, (B, M), 0, len(ordinary))]
    hidden = jnp.where(dice < 0.8, tables["mask"], jnp.where(dice < 0.9, random, targets))
    hidden = jnp.where(weights > 0, hidden, targets)
    tokens = jnp.put_along_axis(tokens, positions, hidden, axis=1, inplace=False)
    return dict(tokens=tokens, positions=positions, targets=targets, weights=weights)


# ---- model ----


class Linear(nnx.Linear):
    """nnx.Linear, but the bias is added in float32: bfloat16 cannot hold its gradient, a sum over tokens."""

    def __call__(self, x):
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return (y + self.bias[...]).astype(self.dtype)


def linear(fan_in, fan_out, config, dtype, rngs, scale=1.0):
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


def gelu(x):
    return jax.nn.gelu(x, approximate=False)  # by erf; GPT-2's is the tanh one


def is_pre_norm(config):
    return config.model_type == "megatron-bert"


class Embeddings(nnx.Module):
    def __init__(self, config, dtype, rngs):
        init = nnx.initializers.normal(config.initializer_range)
        how = dict(features=config.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs)
        # whole tiles; the padding is never seen outside
        self.word_embeddings = nnx.Embed(-(-config.vocab_size // 128) * 128, **how)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, **how)
        self.token_type_embeddings = nnx.Embed(config.type_vocab_size, **how)
        self.LayerNorm = None if is_pre_norm(config) else layer_norm(config, dtype, rngs)

    def __call__(self, tokens, token_types):
        token_types = jnp.zeros((1, 1), int) if token_types is None else token_types
        # looked up in float32 and cast then: in bfloat16 a common token's gradient, a sum over all its
        # places, would stop growing after a few hundred of them
        x = jnp.take(self.word_embeddings.embedding[...], tokens, axis=0)
        x = x + self.position_embeddings.embedding[...][: tokens.shape[1]]
        x = x + jnp.take(self.token_type_embeddings.embedding[...], token_types, axis=0)
        x = x.astype(self.word_embeddings.dtype)
        return x if self.LayerNorm is None else self.LayerNorm(x)  # (B, T, C)


class SelfAttention(nnx.Module):
    def __init__(self, config, dtype, rngs):
        self.n_head, self.rate = config.num_attention_heads, config.attention_probs_dropout_prob
        project = partial(linear, config.hidden_size, config.hidden_size, config, dtype, rngs)
        self.query, self.key, self.value = project(), project(), project()

    def __call__(self, x, mask, key):
        B, T, C = x.shape
        q, k, v = (f(x).reshape(B, T, self.n_head, -1) for f in (self.query, self.key, self.value))
        seen = None if mask is None else mask[:, None, None, :].astype(bool)  # (B, 1, 1, T)
        if key is not None and self.rate > 0:  # the fused kernels know no dropout
            scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
            scores = scores / math.sqrt(q.shape[-1])
            scores = scores if seen is None else jnp.where(seen, scores, -jnp.inf)
            weights = dropout(jax.nn.softmax(scores), self.rate, key)
            y = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)
        else:
            fused = common.attention_kernel(q) if mask is None else None  # a mask would have to be its bias
            y = jax.nn.dot_product_attention(q, k, v, mask=seen, implementation=fused)
        return y.reshape(B, T, C)


class Layer(nnx.Module):
    """Attention and MLP; norms after each, or before each where the config is Megatron's."""

    def __init__(self, config, dtype, rngs):
        C, inner, pre = config.hidden_size, config.intermediate_size, is_pre_norm(config)
        self.pre_norm, self.rate = pre, config.hidden_dropout_prob
        norm = partial(layer_norm, config, dtype, rngs)
        # the checkpoint's names; pre-norm keeps the residual stream's variance (Radford et al. 2019)
        back = partial(linear, config=config, dtype=dtype, rngs=rngs)
        back = partial(back, scale=1 / math.sqrt(2 * config.num_hidden_layers) if pre else 1.0)
        inside = {"self": SelfAttention(config, dtype, rngs), "output": nnx.Dict(dense=back(C, C))}
        self.attention = nnx.Dict(inside)
        self.intermediate = nnx.Dict(dense=linear(C, inner, config, dtype, rngs))
        self.output = nnx.Dict(dense=back(inner, C))
        if pre:
            self.attention.ln, self.ln = norm(), norm()
        else:
            self.attention.output.LayerNorm, self.output.LayerNorm = norm(), norm()

    def __call__(self, x, mask, key=None):
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        y = self.attention["self"](self.attention.ln(x) if self.pre_norm else x, mask, keys[0])
        x = x + dropout(self.attention.output.dense(y), self.rate, keys[1])
        x = x if self.pre_norm else self.attention.output.LayerNorm(x)
        y = gelu(self.intermediate.dense(self.ln(x) if self.pre_norm else x))
        x = x + dropout(self.output.dense(y), self.rate, keys[2])
        return x if self.pre_norm else self.output.LayerNorm(x)


class BERT(nnx.Module):
    """BERT (Devlin et al. 2018), its attributes named as in the published checkpoints.

    `config`: a BertConfig of transformers, or MegatronBertConfig: pre-norm. `head`: mlm, classify or None.
    `dtype`: of the computation; parameters are float32.
    model(tokens (B, T) int32, mask (B, T), token_types (B, T)) -> hidden (B, T, C). Dropout only with a key.
    """

    def __init__(self, config, *, head="mlm", dtype="float32", remat=False, rngs):
        self.config, self.head, self.remat = nnx.static(config), head, remat
        C, dense = config.hidden_size, partial(linear, config=config, dtype=dtype, rngs=rngs)
        layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.bert = nnx.Dict(embeddings=Embeddings(config, dtype, rngs), encoder=nnx.Dict(layer=layers))
        if is_pre_norm(config):
            self.bert.encoder.ln = layer_norm(config, dtype, rngs)
        if head == "mlm":
            transform = nnx.Dict(dense=dense(C, C), LayerNorm=layer_norm(config, dtype, rngs))
            bias = nnx.Param(jnp.zeros(config.vocab_size))
            self.cls = nnx.Dict(predictions=nnx.Dict(transform=transform, bias=bias))
        if head == "classify":
            self.bert.pooler = nnx.Dict(dense=dense(C, C))
            self.classifier = dense(C, config.num_labels)

    def __call__(self, tokens, mask=None, token_types=None, key=None):
        n, rate = len(self.bert.encoder.layer), self.config.hidden_dropout_prob
        keys = [None] * (n + 1) if key is None else jax.random.split(key, n + 1)
        x = dropout(self.bert.embeddings(tokens, token_types), rate, keys[n])  # (B, T, C)
        for i, layer in enumerate(self.bert.encoder.layer):
            layer = jax.checkpoint(layer.__call__) if self.remat else layer
            x = layer(x, mask, keys[i])
        return self.bert.encoder.ln(x) if is_pre_norm(self.config) else x

    def mlm_logits(self, hidden):
        """Logits (..., V) float32 of hidden states (..., C); the decoder is tied to the word embeddings."""
        head = self.cls.predictions
        x = head.transform.LayerNorm(gelu(head.transform.dense(hidden)))
        logits = self.bert.embeddings.word_embeddings.attend(x)[..., : self.config.vocab_size]
        return logits.astype(jnp.float32) + head.bias[...]

    def class_logits(self, hidden, key=None):
        """Logits (B, classes) float32 of hidden states (B, T, C), from the first token."""
        pooled = jnp.tanh(self.bert.pooler.dense(hidden[:, 0]))
        rate = getattr(self.config, "classifier_dropout", None)
        rate = self.config.hidden_dropout_prob if rate is None else rate
        return self.classifier(dropout(pooled, rate, key)).astype(jnp.float32)


# ---- pretrained weights in and out ----


def checkpoint_names(model):
    """{name in the published checkpoint: parameter}; nnx's kernel, scale and embedding are weight there."""
    names = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        names[".".join([*module, "bias" if leaf == "bias" else "weight"])] = param
    return names


def is_kernel(name):
    """Whether the checkpoint holds it as (out, in): dense layers, but no embeddings."""
    return name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight", "classifier.weight"))


def from_pretrained(path, *, head="any", new_head=False, dtype="float32", remat=False, seed=0, **overrides):
    """The BERT of a hub id, a folder or a run directory; `overrides` change its config.

    `head`: mlm, classify, None, or any that the checkpoint has; with `new_head` one that it lacks is new.
    Fewer max_position_embeddings keep the first ones. Raises UsageError for what is not a BERT.
    """
    files = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    folder = common.snapshot(path, "--init-from", files)
    config = common.read_config((BertConfig, MegatronBertConfig), folder, path)
    old = config.num_labels
    config.update(overrides)
    fixed = dict(hidden_act="gelu", tie_word_embeddings=True, is_decoder=False)
    for name, value in (fixed | dict(position_embedding_type="absolute")).items():
        found = getattr(config, name, value)
        expect(found == value, f"--init-from {path}: {name} is {found}, only {value} is supported")
    weights = {}
    for name, w in common.read_weights(folder, path).items():
        # the oldest files have gamma and beta, and bare encoders no prefix
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        bare = name.startswith(("embeddings.", "encoder.", "pooler."))
        weights["bert." * bare + name] = w
    if head == "any":
        marks = {"classifier.weight": "classify", "cls.predictions.transform.dense.weight": "mlm"}
        head = next((kind for name, kind in marks.items() if name in weights), None)
    if config.num_labels != old:
        weights = {name: w for name, w in weights.items() if not name.startswith("classifier.")}
    create = lambda: BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed))
    model = nnx.eval_shape(create)
    of_head = ("cls.", "classifier.", "bert.pooler.")
    new = [name for name in checkpoint_names(model) if name not in weights and name.startswith(of_head)]
    lacks = f"--init-from {path}: has no {', '.join(new)}"
    expect(new_head or not new, f"{lacks}; needed for --task {head}")
    if new:
        print(f"{lacks}; drawn anew")
        model = nnx.jit(create)()
    state = nnx.state(model)
    for name, param in checkpoint_names(state).items():
        if name in new:
            continue
        expect(name in weights, f"--init-from {path}: {name} is missing")
        w = weights[name].astype(np.float32)
        w = w.T if is_kernel(name) else w
        if name.endswith("position_embeddings.weight"):
            w = w[: config.max_position_embeddings]
        if name.endswith("word_embeddings.weight"):
            w = np.pad(w, [(0, -len(w) % 128), (0, 0)])
        expect(w.shape == param.shape, f"--init-from {path}: {name} is {w.shape}, expected {param.shape}")
        param.set_value(jnp.asarray(w))
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
        tokenizer.save_pretrained(folder)


# ---- loss and optimizer ----


def target_logits(model, batch, key=None):
    """Logits of what a batch asks for: the masked positions (B, M, V), or the class (B, classes)."""
    keys = (None, None) if key is None else jax.random.split(key)
    tokens, lengths = batch["tokens"], batch.get("lengths")  # without lengths nothing is padding
    mask = None if lengths is None else jnp.arange(tokens.shape[1]) < lengths[:, None]
    hidden = model(tokens, mask, key=keys[0])
    if "positions" not in batch:
        return model.class_logits(hidden, keys[1])
    return model.mlm_logits(jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1))


def loss_sum(model, batch, key=None):
    """Cross-entropy in nats and hits, summed over the targets by their weights; and what was predicted."""
    logits, targets, weights = target_logits(model, batch, key), batch["targets"], batch["weights"]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    found = jnp.argmax(logits, axis=-1)
    return jnp.sum(nats * weights), jnp.sum((found == targets) * weights), found


def make_schedule(cfg):
    """Linear warm-up for `warmup_steps`, then a line down to min_lr at `steps`."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    up = optax.linear_schedule(cfg.lr / (warm + 1), cfg.lr, warm)
    return optax.join_schedules([up, optax.linear_schedule(cfg.lr, cfg.min_lr, steps - warm)], [warm])


def make_optimizer(cfg, schedule):
    """AdamW, or Muon (Jordan 2024) on the hidden matrices with updates of AdamW's size (arXiv 2502.16982)."""
    decayed = partial(jax.tree.map, lambda p: p.ndim >= 2)  # matrices and embeddings, not biases and norms
    how = dict(b1=0.9, b2=0.98, eps=1e-6)  # RoBERTa's (Liu et al. 2019)
    rule = optax.adamw(schedule, **how, weight_decay=cfg.weight_decay, mask=decayed)
    if cfg.optimizer == "muon":
        muon = optax.contrib.muon(schedule, weight_decay=cfg.weight_decay, consistent_rms=0.2)
        kind = lambda path, p: "hidden" if path[1].key == "encoder" and p.ndim == 2 else "rest"
        kinds = partial(jax.tree_util.tree_map_with_path, kind)
        rule = optax.partition({"hidden": muon, "rest": rule}, kinds)
    # of the same form without, so that a run can go on with another --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    return optax.chain(clip, rule)


# ---- train and eval step ----


def make_train_step(graphdef, state, accum, schedule, prepare):
    """jit: (state, batch, key of this step) -> (state, metrics). The state is donated.

    `prepare(key, batch)` makes of what the stream gave what loss_sum reads: it draws the masks.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    def train_step(state, batch, key):
        model, optimizer = nnx.merge(graphdef, state)
        model_def, params = nnx.split(model)
        mask_key, key = jax.random.split(key)
        batch = prepare(mask_key, batch)  # all rows at once: the masks are the same with any accum
        total = jnp.maximum(jnp.sum(batch["weights"]), 1)  # a target weighs the same in any microbatch
        # a microbatch is every accum-th row, so that devices keep their own rows: (accum, B / accum, ...)
        batch = jax.tree.map(lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch)

        def loss_fn(params, batch, key):
            nats, hits, _ = loss_sum(nnx.merge(model_def, params), batch, key)
            return nats / total, hits / total

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

        def microbatch(sums, batch):
            return jax.tree.map(jnp.add, sums, value_and_grad(params, *batch)), None

        if accum == 1:
            (loss, acc), grads = value_and_grad(params, jax.tree.map(lambda x: x[0], batch), key)
        else:
            zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params)
            ((loss, acc), grads), _ = jax.lax.scan(microbatch, zeros, (batch, jax.random.split(key, accum)))
        metrics = {"loss": loss, "acc": acc, "lr": schedule(optimizer.step[...])}
        metrics["grad_norm"] = optax.global_norm(grads)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    return train_step


def eval_sums(model, batch):
    """Sums over the targets: nats, hits, number; and for a classifier, (classes,) hits, texts and guesses."""
    nats, hits, found = loss_sum(model, batch)
    sums = dict(nats=nats, hits=hits, count=jnp.sum(batch["weights"]))
    if model.head == "classify":
        one_hot = partial(jax.nn.one_hot, num_classes=model.config.num_labels)
        truth, guess = one_hot(batch["targets"]) * batch["weights"][:, None], one_hot(found)
        sums |= dict(right=jnp.sum(truth * guess, 0), true=jnp.sum(truth, 0))
        sums |= dict(guessed=jnp.sum(guess * batch["weights"][:, None], 0))
    return sums


def evaluate(eval_step, state, batch, batch_size, put):
    """Mean loss and accuracy over every target of `batch`, in any batch size; a classifier's macro-F1."""
    n, sums = len(batch["tokens"]), []
    short = -n % batch_size  # the last batch is filled up with rows that do not count
    batch = {k: np.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1)), mode="edge") for k, x in batch.items()}
    batch["weights"][n:] = 0
    for i in range(0, n, batch_size):
        sums.append(eval_step(state, put({k: x[i : i + batch_size] for k, x in batch.items()})))
    s = {k: np.sum(jax.device_get([one[k] for one in sums]), axis=0, dtype=np.float64) for k in sums[0]}
    result = {"val_loss": float(s["nats"] / s["count"]), "val_acc": float(s["hits"] / s["count"])}
    if "right" in s:
        there = s["true"] + s["guessed"] > 0  # a class that is neither there nor guessed has no F1
        result["val_f1"] = float(np.mean(2 * s["right"][there] / (s["true"] + s["guessed"])[there]))
    return result


def unigram_baseline(tokens, rules, batch):
    """Loss and accuracy on a masked `batch` of one who knows only how often each token stands in `tokens`."""
    counts = np.bincount(tokens.reshape(-1), minlength=len(rules["special"])) * ~rules["special"]
    p, targets = counts / counts.sum(), batch["targets"][batch["weights"] > 0]
    return float(-np.mean(np.log(p[targets]))), float(np.mean(targets == p.argmax()))


def flops_per_token(model, length, batch):
    """FLOPs to train on a token: 6 a parameter but for the embeddings', 12 L C T for attention; the MLM head
    runs on the masked tokens alone."""
    size = lambda module: sum(p.size for p in jax.tree.leaves(nnx.state(module)))
    config, C = model.config, model.config.hidden_size
    flops = 6 * size(model.bert.encoder) + 12 * config.num_hidden_layers * C * length
    share = batch["positions"].shape[1] / length if model.head == "mlm" else 0
    return flops + 6 * share * (C + config.vocab_size) * C


# ---- fill-mask, embeddings ----

EXAMPLES = {"stdlib": ("for i in [MASK](10):",), "english": ("The capital of France is [MASK].",)}


@partial(nnx.jit, static_argnums=5)
def _likeliest(model, tokens, mask, row, at, k):
    logits = model.mlm_logits(model(tokens, mask)[row, at])
    return jax.lax.top_k(jax.nn.softmax(logits), k)


def encode_prompts(tokenizer, texts, positions):
    """[CLS] text [SEP] as token ids of each text, with a mask for each [MASK]; UsageError without one."""
    mask, rows = tokenizer.mask_token_id, []
    lstrip = tokenizer.added_tokens_decoder[mask].lstrip  # the space before goes with the mask
    for text in texts:
        *before, last = text.replace(tokenizer.mask_token, "[MASK]").split("[MASK]")
        expect(before, f"--prompt {text!r}: holds no [MASK]")
        pieces = encode(tokenizer, [*(piece.rstrip() if lstrip else piece for piece in before), last])
        inner = [token for piece in pieces for token in (*piece.tolist(), mask)][:-1]
        rows.append([tokenizer.cls_token_id, *inner, tokenizer.sep_token_id])
        n = len(rows[-1])
        expect(n <= positions, f"--prompt: {n} tokens, and there are {positions} positions")
    return rows


def fill_mask(model, tokenizer, texts, k=5):
    """For each mask in each text: the k likeliest [(probability, text with that token in its place)]."""
    positions = model.config.max_position_embeddings
    ids, out = encode_prompts(tokenizer, texts, positions), []
    lengths = np.array([len(row) for row in ids])
    tokens = pad(ids, bucket(lengths.max(), positions), tokenizer.pad_token_id)
    masks = np.argwhere(tokens == tokenizer.mask_token_id)
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    p, best = map(common.to_host, _likeliest(model, tokens, mask, *masks.T, k))
    for (row, at), probabilities, candidates in zip(masks, p.tolist(), best.tolist()):
        before, after = ids[row][1:at], ids[row][at + 1 : -1]
        filled = [tokenizer.decode([*before, token, *after]) for token in candidates]
        out.append(list(zip(probabilities, filled)))
    return out


def show_fills(fills):
    return "\n\n".join("\n".join(f"{p:6.1%}  {text!r}" for p, text in best) for best in fills)


@partial(nnx.jit, static_argnums=3)
def _embed(model, tokens, lengths, pooling):
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    hidden = model(tokens, mask).astype(jnp.float32)
    x = hidden[:, 0] if pooling == "cls" else jnp.sum(hidden * mask[..., None], 1) / lengths[:, None]
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def embed(model, tokenizer, texts, pooling="mean", batch_size=32):
    """Unit vectors (N, C) float32: the mean over a text's tokens, with [CLS] and [SEP], or that of [CLS].

    Texts of about one length are embedded together. Longer ones than the model's positions are cut; how many
    is printed.
    """
    longest = model.config.max_position_embeddings
    rows, cut = encode_whole(tokenizer, texts, longest)
    if cut.any():
        print(f"{cut.sum()} of {len(texts)} texts are longer than {longest} tokens and were cut")
    order = np.argsort([-len(row) for row in rows], kind="stable")  # the longest first: memory fails at once
    out = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for i in range(0, len(order), batch_size):
        some = order[i : i + batch_size]
        filled = np.resize(some, batch_size)  # the last batch repeats some
        lengths = np.array([len(rows[j]) for j in filled], np.int32)
        tokens = pad([rows[j] for j in filled], bucket(lengths.max(), longest), tokenizer.pad_token_id)
        out[some] = np.asarray(_embed(model, tokens, lengths, pooling))[: len(some)]
    return out


def run_mteb(model, tokenizer, tasks, cfg):
    """Evaluate embeddings on task objects of the mteb package; {task: main score}, details under out_dir."""
    import mteb
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(AbsEncoder):
        def __init__(self):
            name = Path(cfg.init_from).resolve().name if Path(cfg.init_from).exists() else cfg.init_from
            name = name if "/" in name else f"nanoflax/{name}"
            about = dict(name=name, revision=cfg.pooling, embed_dim=model.config.hidden_size)
            self.mteb_model_meta = ModelMeta.create_empty(about)

        def encode(self, inputs, **_):
            texts = [text for batch in inputs for text in batch["text"]]
            return embed(model, tokenizer, texts, cfg.pooling)

    cache = mteb.ResultCache(cfg.out_dir or "out/mteb")
    try:
        found = mteb.evaluate(Encoder(), tasks, cache=cache, overwrite_strategy="always")
    except Exception as error:  # mteb downloads its tasks
        if not common.is_transient(error):
            raise
        raise common.RunError(f"--mteb {' '.join(cfg.mteb)}: {common.first_line(error)}") from error
    return {result.task_name: float(result.get_score()) for result in found.task_results}


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    common.check(cfg, "val_docs seq_len shuffle_buffer n_layer n_head n_embd")
    expect(cfg.n_embd % cfg.n_head == 0, f"--n-embd {cfg.n_embd}: must be divisible by --n-head {cfg.n_head}")
    expect(cfg.seq_len > 2, f"--seq-len {cfg.seq_len}: must hold [CLS], [SEP] and a token")
    expect(0 < cfg.mask_share < 1, f"--mask-share {cfg.mask_share}: must be in (0, 1)")
    expect(not (cfg.prompt and cfg.task != "mlm"), "--prompt: fills masks, which --task classify has not")
    for name in ("embed", "mteb"):
        value = getattr(cfg, name)
        expect(not (value and cfg.steps), f"{flag(name)} {value}: is for a finished model; add --steps 0")


def use(cfg):
    """What --prompt, --embed and --mteb ask of the model in --init-from; the scores of mteb."""
    out, texts = cfg.embed and Path(cfg.embed).with_suffix(".npy"), []
    if cfg.embed:
        expect(Path(cfg.embed).is_file(), f"--embed {cfg.embed}: no such file")
        texts = Path(cfg.embed).read_text("utf-8", errors="replace").removesuffix("\n").split("\n")
        expect(any(text.strip() for text in texts), f"--embed {cfg.embed}: is empty, expected a text a line")
        taken = f"--embed {cfg.embed}: {out} exists; --overwrite to replace it"
        expect(cfg.overwrite or not out.exists(), taken)
    if cfg.mteb:
        names = " ".join(cfg.mteb)
        expect(importlib.util.find_spec("mteb"), f"--mteb {names}: needs `pip install mteb`")
        import mteb

        tasks = []
        for name in cfg.mteb:
            try:
                tasks.append(mteb.get_task(name))
            except KeyError as error:
                why = error.args[0].removeprefix("KeyError: ")
                raise common.UsageError(f"--mteb {name}: {why}") from error
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.init_from)
    model = from_pretrained(cfg.init_from, head="mlm" if cfg.prompt else None, dtype=cfg.dtype)
    check_vocabulary(cfg, model.config, tokenizer)
    if cfg.prompt:
        print(show_fills(fill_mask(model, tokenizer, cfg.prompt)))
    if cfg.embed:
        vectors = embed(model, tokenizer, texts, cfg.pooling)
        np.save(out, vectors)
        print(f"{len(vectors):,} vectors of {vectors.shape[1]} are in {out}")
    scores = run_mteb(model, tokenizer, tasks, cfg) if cfg.mteb else {}
    for name, score in scores.items():
        print(f"{name} {100 * score:.2f}")
    return scores


def check_vocabulary(cfg, config, tokenizer):
    name, V = cfg.tokenizer or cfg.init_from, len(tokenizer)
    vocabulary = f"{cfg.init_from} has a vocabulary of {config.vocab_size}"
    expect(config.vocab_size >= V, f"--tokenizer {name}: has {V} tokens, and {vocabulary}")


def build(cfg, tokenizer, classes):
    """The model to start from: that of --init-from, or a new one. `classes`: their names, to classify."""
    kinds = dict(hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout)
    if classes:
        kinds |= dict(id2label=dict(enumerate(classes)), label2id={c: i for i, c in enumerate(classes)})
    how = dict(head=cfg.task, dtype=cfg.dtype, remat=cfg.remat)
    if not cfg.init_from:
        sizes = dict(num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, hidden_size=cfg.n_embd)
        sizes |= dict(intermediate_size=4 * cfg.n_embd, max_position_embeddings=cfg.seq_len)
        kind = MegatronBertConfig if cfg.pre_norm else BertConfig
        config = kind(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **kinds)
        return nnx.jit(lambda: BERT(config, rngs=nnx.Rngs(cfg.seed), **how))()
    model = from_pretrained(cfg.init_from, new_head=cfg.steps > 0, seed=cfg.seed, **how, **kinds)
    config, default = model.config, Config(**PRESETS[cfg.preset])
    names = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size")
    for name, theirs in names.items():  # left at the default, they are those of the checkpoint
        asked, found = getattr(cfg, name), getattr(config, theirs)
        expect(asked in (found, getattr(default, name)), f"{flag(name)} {asked}: {cfg.init_from} has {found}")
    asked, found = cfg.pre_norm, is_pre_norm(config)
    norms = f"--{'' if asked else 'no-'}pre-norm: {cfg.init_from} is a {'pre' if found else 'post'}-norm BERT"
    expect(asked in (found, default.pre_norm), norms)
    check_vocabulary(cfg, config, tokenizer)
    return model


def find_classes(train, held_out, data):
    """Names of the classes: those that the data set gives, else 0 to the largest of 100,000 labels."""
    names = train[0].classes
    same = all(source.classes == names for source in (*train, *held_out))
    expect(same, f"--data {data}: not all of it, validation included, names the same classes")
    if names is None:
        labels = {record["label"] for record in islice(common.mix(train), 100_000)}
        names = [str(i) for i in range(max(labels) + 1)] if len(labels) > 1 else sorted(labels)
    found = ", ".join(map(str, names)) or "missing"
    expect(len(names) > 1, f"--data {data}: all labels are {found}; expected two classes or more")
    return names


def prepare_mlm(cfg, tokenizer, records):
    """What the steps do to a batch of rows; the validation batch; and what to say of it."""
    rules = masking_rules(tokenizer)
    mask = partial(mask_tokens, rules=rules, share=cfg.mask_share, whole_word=cfg.whole_word)
    rows = validation_rows(tokenizer, [record["text"] for record in records], cfg.seq_len)
    batch = jax.device_get(jax.jit(mask)(jax.random.key(1), rows))  # the same masks in every validation
    lengths = np.sum(rows != tokenizer.pad_token_id, axis=1)
    nats, share = unigram_baseline(rows, rules, batch)
    said = f"loss {nats:.3f}, accuracy {share:.3f} by the frequencies of tokens alone"
    few = cfg.eval_batches * cfg.batch_size or None
    batch = {name: x[:few] for name, x in (batch | {"lengths": lengths}).items()}
    return lambda key, batch: mask(key, batch["tokens"].astype(jnp.int32)), batch, said


def prepare_classify(cfg, tokenizer, records, classes):
    """The same for texts with labels."""
    records = records[: cfg.eval_batches * cfg.batch_size or None]  # before they are sorted by length
    rows, cut = encode_whole(tokenizer, [record["text"] for record in records], cfg.seq_len)
    labels = np.array([record["label"] for record in records], np.int32)
    other = f"validation has label {labels.max()}, and training {len(classes)} classes"
    expect(labels.max() < len(classes), other)
    order = np.argsort([len(row) for row in rows], kind="stable")  # so that batches are narrow
    rows, labels = [rows[i] for i in order], labels[order]
    batch = dict(tokens=pad(rows, cfg.seq_len, tokenizer.pad_token_id), targets=labels)
    batch |= dict(lengths=np.array([len(row) for row in rows]), weights=np.ones(len(rows), np.float32))
    share = np.bincount(labels).max() / len(labels)
    alike = f"all {len(labels)} texts to validate on are {classes[labels[0]]}; shuffle the data"
    expect(share < 1 or not cfg.steps, f"--val-docs {cfg.val_docs}: {alike}, or give --val-data")
    said = f"{len(classes)} classes: accuracy {share:.3f} by the most frequent alone"
    if cut.any():
        said += f"; {cut.sum()} of {len(rows)} texts are longer than --seq-len {cfg.seq_len} and were cut"
    return lambda _, batch: batch | {"weights": jnp.ones(batch["targets"].shape)}, batch, said


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or use. Raises UsageError."""
    cfg = dataclasses.replace(cfg, **{k: v for k, v in TASKS[cfg.task].items() if getattr(cfg, k) is None})
    check(cfg)
    key, mesh, mlm, T = jax.random.key(cfg.seed), common.make_mesh(), cfg.task == "mlm", cfg.seq_len
    if not cfg.steps and (cfg.prompt or cfg.embed or cfg.mteb):
        return use(cfg)

    # the documents to validate on, then the tokenizer
    columns = {"text": cfg.text_column} | ({} if mlm else {"label": cfg.label_column})
    sources = common.open_data(cfg, columns)
    train, data = [splits["train"] for splits in sources], " ".join((*cfg.data, *cfg.data_name))
    found, val_name = sources, data
    if cfg.val_data:
        found = common.open_data(cfg, columns, cfg.val_data, "--val-data")
        val_name = " ".join(cfg.val_data)
    held_out = [splits.get("validation", splits.get("test", splits["train"])) for splits in found]
    weights = () if cfg.val_data else cfg.data_weights  # those are the shares of --data
    val = list(islice(common.mix(held_out, weights), cfg.val_docs))
    n, val_set = len(val), {record["text"] for record in val}
    fewer = "ask for fewer, or give --val-data (a text file is one document)"
    few = f"--val-docs {cfg.val_docs}: {val_name} has only {n} documents; {fewer}"
    expect(n == cfg.val_docs or (n and cfg.val_docs == TASKS["classify"]["val_docs"] and not mlm), few)
    documents = lambda: (r["text"] for r in common.mix(train, cfg.data_weights) if r["text"] not in val_set)
    left = f"--val-docs {n}: leaves no document of {data} to train on; {fewer}"
    expect(not cfg.steps or any(documents()), left)
    name = cfg.out_dir if cfg.resume else cfg.tokenizer or cfg.init_from or "bpe:2048"
    tokenizer = load_tokenizer(name, documents())
    classes, cut = None if mlm else find_classes(train, held_out, data), set()
    prepared = prepare_mlm(cfg, tokenizer, val) if mlm else prepare_classify(cfg, tokenizer, val, classes)
    prepare, val_batch, baseline = prepared

    # a prompt is looked at before the run begins; an example that is too long is none
    example = cfg.prompt or EXAMPLES["stdlib" if cfg.data == ("stdlib",) else "english"]
    if not mlm or (not cfg.prompt and len(encode(tokenizer, example)[0]) + 2 > T):
        example = ()
    encode_prompts(tokenizer, example, T)

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model, schedule = build(cfg, tokenizer, classes), make_schedule(cfg)
    positions = model.config.max_position_embeddings
    expect(cfg.seq_len <= positions, f"--seq-len {cfg.seq_len}: {cfg.init_from} has {positions} positions")
    graphdef, state = nnx.split((model, nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, cfg.accum, schedule, prepare)
    sums = lambda state, batch: eval_sums(nnx.merge(graphdef, state)[0], batch)
    eval_step = jax.jit(sums, out_shardings=common.replicated(mesh))
    whole = mlm or jax.process_count() > 1  # processes must agree on a batch's width
    put = lambda batch: common.shard_batch(mesh, batch if whole else narrow(batch))
    put_whole = lambda batch: common.shard_whole_batch(mesh, batch if mlm else narrow(batch))

    def validate(state):
        return evaluate(eval_step, state, val_batch, cfg.batch_size, put_whole)

    if not cfg.steps:
        result = validate(state)
        print(f"baseline   {baseline}")
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {n} documents of {val_name}")
        return result

    # the run directory, the newest checkpoint in it, and the stream from where that was
    def write_folder(folder):
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)

    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
    run = common.Run("bert", cfg, common.fingerprint(train) | {"tokenizer": digest}, write_folder)
    step, state, position = run.restore(state)
    make_rows = training_rows if mlm else partial(labelled_rows, classes=classes, cut=cut)
    epochs = [partial(make_rows, source, tokenizer, cfg, val_set) for source in train]
    rows, how = cfg.batch_size // jax.process_count(), dict(seed=cfg.seed, position=position)
    if cfg.data == ("synthetic",):
        columns = {"tokens": ((T,), 0, len(tokenizer), np.int32)}
        if not mlm:
            columns |= dict(lengths=((), T, T + 1, np.int32), targets=((), 0, len(classes), np.int32))
        stream = common.synthetic_batches(columns, rows, **how)
    else:
        how |= dict(weights=cfg.data_weights, retries=cfg.retries)
        stream = common.batches(epochs, rows, **how)
    stream = common.Prefetch(stream, depth=128, stop=lambda: run.stop)

    N = sum(p.size for p in jax.tree.leaves(nnx.state(model)))
    unit, length = ("tokens", T) if mlm else ("texts", float(np.mean(val_batch["lengths"])))
    per_step = cfg.batch_size * (T if mlm else 1)
    flops = flops_per_token(model, length, val_batch) * (1 if mlm else length)
    print(f"model      {type(model.config).__name__[:-6]}, {N / 1e6:.1f} M parameters, {cfg.dtype}")
    print(f"devices    {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"data       {data}, validation on {n} documents of {val_name}")
    print(f"baseline   {baseline}")
    print(f"tokenizer  {name}, {len(tokenizer):,} tokens")
    print(f"step       {cfg.batch_size} rows x {T} = {cfg.batch_size * T:,} tokens, {cfg.optimizer}")
    print(f"run        {run.dir}, from step {step} to {cfg.steps}", flush=True)
    del model  # with --fsdp, or the first device would keep it whole

    with run.training(step, unit, per_step, flops, stream):
        for batch, position in islice(stream, cfg.steps - step):  # ends early on Ctrl-C or SIGTERM
            state, metrics = train_step(state, put(batch), jax.random.fold_in(key, step))
            step += 1
            run.step(step, state, position, metrics)
            last = step == cfg.steps
            if step % cfg.eval_every == 0 or last:
                with run.pause():
                    result = validate(state)
                    model = nnx.merge(graphdef, state)[0]
                    said = show_fills(fill_mask(model, tokenizer, example)) if example else ""
                run.flush(**result)
                if cut:
                    said = f"{len(cut)} texts so far are longer than --seq-len {T} and were cut"
                if said:
                    run.say(said)
            if step % cfg.ckpt_every == 0 or last:
                run.save()
    save_pretrained(nnx.merge(graphdef, state)[0], run.dir, tokenizer)
    print(f"a Hugging Face model folder is in {run.dir}")
    return run.last


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
