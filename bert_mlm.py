"""BERT (Devlin et al. 2018) pre-trained from a stream of text by masked LM, and put to use.

    python bert_mlm.py --steps 1000        # offline: a small BERT on the source of Python's library
    python bert_mlm.py --preset bert-base  # BERT-base on FineWeb-Edu, streamed from the hub
    python bert_mlm.py --steps 0 --init-from out/bert-001 --prompt "for i in [MASK](10):"
    python bert_mlm.py --preset classify --data reviews.csv --init-from bert-base-uncased
    python bert_mlm.py --task classify --steps 0 --init-from out/bert-002 --prompt "well made"

Documents are tokenised as they arrive and packed into rows [CLS] ... [SEP] without padding. Masks
are drawn on the device, at most M in every row: the head works on these positions alone. A run
killed at any moment goes on with --resume, bit for bit. When it ends, its directory is a Hugging
Face model.

Measured on two CPU cores: the first command guesses 38 % of the masked held-out tokens.

Shapes: B batch, T tokens, M masked, C channels (n_embd), H heads, D head size, V vocabulary.
"""

import dataclasses
import json
import math
import numbers
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import common
from common import expect

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import BertProcessing
from transformers import AutoTokenizer, BertConfig, MegatronBertConfig, PreTrainedTokenizerFast


@dataclasses.dataclass
class Config(common.RunConfig):
    # a recipe: other defaults for these flags
    preset: Literal["stdlib", "bert-mini", "bert-base", "bert-large", "classify"] = "stdlib"
    task: Literal["mlm", "classify"] = "mlm"  # masked LM, or classes of texts (see the preset)
    # data
    data: str = "stdlib"  # stdlib (Python's source), a hub id, a file, URL, folder, or 'a/*.txt'
    data_name: str | None = None  # configuration of a data set on the hub, as in sample-10BT
    text_column: str | None = None  # column with the text; else "text"
    label_column: str | None = None  # column with the class, a number from 0; else "label"
    val_data: str | None = None  # to validate on; else data's validation or test split, or start
    val_docs: int = 10  # documents to validate on; they and their copies are never trained on
    tokenizer: str | None = None  # hub id, folder, bpe:N (trained); else init_from's, bpe:2048
    seq_len: int = 32  # tokens in a row, T
    shuffle_buffer: int = 1_000  # documents whose rows are shuffled together
    # model
    n_layer: int = 4  # blocks, L; with init_from all sizes are its own
    n_head: int = 4  # attention heads, H
    n_embd: int = 128  # width, C
    pre_norm: bool = True  # norms before each block, as Megatron's BERT: needs less warm-up
    dropout: float | None = None  # on embeddings, attention, branches; else init_from's, or 0
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 1_000  # optimizer steps; 0 only evaluates, or puts to use, init_from
    batch_size: int = 128  # rows a step, over all devices
    device_rows: int = 32  # rows that a device takes at once; more of them are microbatches
    mask_share: float = 0.15  # share of a row's tokens to predict
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: hidden matrices; the rest stays on adamw
    lr: float = 1e-2  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end
    cooldown: float = 0.0  # share of the steps in which a constant rate falls; 0 always falls
    warmup_steps: int = 50  # steps in which the rate rises in a line to lr
    weight_decay: float = 0.01  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, masks and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation, not of parameters
    remat: bool = False  # recompute each block in the backward pass: less memory, more work
    # use
    prompt: tuple[str, ...] = ()  # texts with a [MASK] to fill; with task classify any texts
    embed: str | None = None  # text file to embed, a text a line, into an .npy beside it
    mteb: tuple[str, ...] = ()  # tasks of the mteb package for the embeddings, as STSBenchmark
    pooling: Literal["mean", "cls"] | None = None  # a text's vector; else init_from's, or mean


# batch, 6 % of warm-up, base's and large's rates are MosaicBERT's (arXiv 2312.17482)
FINEWEB = {
    "data": "HuggingFaceFW/fineweb-edu",
    "data_name": "sample-10BT",
    "tokenizer": "bert-base-uncased",
    "shuffle_buffer": 10_000,
    "val_docs": 1_000,
    "seq_len": 128,
    "batch_size": 4_096,
    "steps": 19_073,  # of 4,096 x 128 tokens: the 10 B tokens of the sample
    "pre_norm": False,
    "optimizer": "adamw",
    "warmup_steps": 1_150,
    "dtype": "bfloat16",
}
CLASSIFY = {
    "task": "classify",
    "val_docs": 500,
    "seq_len": 128,
    "batch_size": 32,
    "optimizer": "adamw",
    "lr": 1e-4,
}


def fineweb(**sizes):
    return FINEWEB | sizes


PRESETS = {
    "stdlib": {},
    "bert-mini": fineweb(n_layer=4, n_head=4, n_embd=256, lr=1e-3, device_rows=2_048),
    "bert-base": fineweb(n_layer=12, n_head=12, n_embd=768, lr=5e-4, device_rows=512),
    "bert-large": fineweb(n_layer=24, n_head=16, n_embd=1024, lr=2e-4, device_rows=128, remat=True),
    "classify": CLASSIFY,
}
# flag: the preset's value that is void where this flag is given
FORGET = {"data": "data_name", "init_from": "tokenizer"}

# flags that may change when a run goes on; another would change what its checkpoint means
MAY_CHANGE = {
    "steps", "device_rows", "lr", "min_lr", "cooldown", "warmup_steps", "weight_decay", "grad_clip",
    "init_from", "dropout", "remat",
}  # fmt: skip


# ---- data: documents -> tokens -> rows -> batches ----


class Corpus(NamedTuple):
    """What --data and --val-data name: texts; for task classify, pairs (text, label)."""

    train: datasets.IterableDataset
    parse: Callable  # record -> its text or pair; ValueError says why it has none
    faults: dict  # arguments of common.windows: the errors to reopen after, and how often
    held_out: list  # texts or pairs to validate on
    first: Iterator  # the first ones to train on, for a tokenizer
    facts: dict  # what a resume must find again
    classes: list | None  # the names of the labels


def open_corpus(cfg):
    """Open --data and --val-data, and hold out the texts to validate on. Raises UsageError."""
    old_facts = common.read_run(cfg.out_dir)["facts"] if cfg.resume else {}
    data, parse, classes = open_one("--data", cfg.data, cfg.data_name, old_facts.get("commit"), cfg)
    facts = dict(data.facts)
    if cfg.val_data:
        commit = old_facts.get("val commit")
        val_data, val_parse, names = open_one("--val-data", cfg.val_data, None, commit, cfg)
        expect(names == classes, f"--val-data {cfg.val_data}: names other classes than --data")
        facts |= {f"val {name}": fact for name, fact in val_data.facts.items()}
    else:
        val_data = data
        val_parse = parse
    split = next(name for name in ("validation", "test", "train") if name in val_data.splits)
    n = cfg.val_docs
    held_out = list(islice(texts_in_order(val_data, split, val_parse), n))
    advice = "ask for fewer, or give --val-data"
    expect(len(held_out) == n, f"--val-docs {n}: there are {len(held_out)}; {advice}")
    known = set(held_out)
    others = (text for text in texts_in_order(data, "train", parse) if text not in known)
    one = list(islice(others, 1))
    expect(one or not cfg.steps, f"--val-docs {n}: leaves none to train on; {advice}")
    first = chain(one, islice(others, 10_000))
    corpus = Corpus(
        train=data.splits["train"],
        parse=parse,
        faults=data.faults,
        held_out=held_out,
        first=first,
        facts=facts,
        classes=classes,
    )
    if cfg.task == "classify":
        return name_classes(corpus, cfg)
    return corpus


def open_one(flag, name, configuration, commit, cfg):
    """(common.Data, what takes the text or pair out of a record, classes) of what a flag names."""
    with common.usage_errors(f"{flag} {name}"):
        files = f"{sysconfig.get_path('stdlib')}/*.py" if name == "stdlib" else name
        data = common.open_data(files, configuration, commit)
        train = data.splits["train"]
        columns = [common.find_column(train, cfg.text_column, ["text", "txt"], str)]
        parse = partial(text_of, column=columns[0])
        classes = None
        if cfg.task == "classify":
            usual = ["label", "labels", "cls", "class"]
            label_column = common.find_column(train, cfg.label_column, usual, numbers.Real)
            columns.append(label_column)
            classes = getattr((train.features or {}).get(label_column), "names", None)
            parse = partial(pair_of, columns=columns, classes=classes)
        for split, dataset in data.splits.items():
            if dataset.column_names:  # unknown of files of text
                data.splits[split] = dataset.select_columns(columns)
    return data, parse, classes


def text_of(record, column):
    """The text in a record, "" of an empty one. ValueError says why it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is {str(record)[:40]}, expected a dict")
    if common.BAD in record:
        raise ValueError(record[common.BAD])
    if record and column not in record:
        raise ValueError(f"no {column} in it")
    text = record.get(column)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{column} is {str(text)[:40]}")
    text.encode()  # half a character (a lone surrogate) is a ValueError here
    if "\0" in text:
        raise ValueError("is no text: holds NUL, as UTF-16 does")
    return text


def pair_of(record, columns, classes=None):
    """(text, label) of a record, () of one without text. ValueError says why it is bad."""
    text = text_of(record, columns[0])
    label = record.get(columns[1])
    if not text:
        return ()
    if not isinstance(label, numbers.Real) or label % 1 != 0 or label < 0:
        raise ValueError(f"label is {str(label)[:40]}, expected 0, 1, ...")
    if classes and label >= len(classes):
        raise ValueError(f"label is {label}, and there are {len(classes)} classes")
    return text, int(label)


def good_records(records, parse, place, bad):
    """[parse(record)] of the good ones in a window, and the number of bad ones so far in the run.

    `parse` raises ValueError to say why a record is bad. `place` is where the window begins, and
    `bad` records came before it.
    """
    good = []
    for i, record in enumerate(records):
        try:
            good.append(parse(record))
        except ValueError as error:
            bad += 1
            what = f"record {place['record'] + i:,} of epoch {place['epoch']}"
            common.report_bad(bad, place["seen"] + i + 1, f"{what}: {common.reason(error)}")
    return good, bad


def texts_in_order(data, split, parse):
    """The texts or pairs of a split, once, in the order of the files."""
    bad = 0
    for records, _, place in common.windows(data.splits[split], 16, seed=None, **data.faults):
        texts, bad = good_records(records, parse, place, bad)
        yield from (text for text in texts if text)


def name_classes(corpus, cfg):
    """The corpus with names of classes; else these are 0, 1, ... up to the largest label seen."""
    labels = {label for _, label in corpus.held_out}
    only = f"--val-docs {cfg.val_docs}: all are of class {min(labels)}; give --val-data"
    expect(len(labels) > 1 or cfg.steps == 0, only)
    if corpus.classes:
        return corpus
    first = list(corpus.first)
    largest = max(labels.union(label for _, label in first))
    what = f"a label is {largest}; expected numbers of classes, 0, 1, ..."
    expect(largest < 100_000, f"--label-column: {what}")
    classes = [str(i) for i in range(largest + 1)]
    parse = partial(corpus.parse, classes=classes)  # a label beyond is a bad record
    return corpus._replace(parse=parse, first=iter(first), classes=classes)


def load_tokenizer(name, documents=(), is_new=True):
    """The tokenizer `name`: a hub id, a folder, or "bpe:N", trained on `documents`.

    It makes [CLS] text [SEP] of a text. One that does not is taught to for a model that `is_new`;
    with another it is refused.
    """
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        is_size = size.isdecimal() and int(size) > 261  # the 256 bytes and the special ones
        expect(is_size, f"--tokenizer {name}: expected bpe:N, N above 261")
        return train_tokenizer(int(size), documents)
    folder = common.snapshot(name)
    with common.usage_errors(f"--tokenizer {name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        is_fast = tokenizer.is_fast and len(tokenizer) > len(tokenizer.all_special_tokens)
        expect(is_fast, "no fast tokenizer in it (tokenizer.json); name one with --tokenizer")
        rate = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
        expect(not rate, f"has a dropout of {rate}, and a resume could not repeat its rows")
        for kind in ("mask_token", "cls_token", "sep_token", "pad_token"):
            expect(getattr(tokenizer, kind), f"has no {kind}; BERT needs one")
        is_right = tokenizer.truncation_side == tokenizer.padding_side == "right"
        expect(is_right, "truncates or pads at the left, only the right is supported")
        ids = tokenizer("a")["input_ids"]
        if ids[:1] + ids[-1:] != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
            expect(is_new, "does not make [CLS] text [SEP] of a text")
            cls = (tokenizer.cls_token, tokenizer.cls_token_id)
            sep = (tokenizer.sep_token, tokenizer.sep_token_id)
            tokenizer.backend_tokenizer.post_processor = BertProcessing(sep, cls)
    return tokenizer


def train_tokenizer(size, documents):
    """A byte-level BPE (Sennrich et al. 2015) of `size` tokens."""
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": AddedToken("[MASK]", lstrip=True),  # takes the space before it, as words do
    }
    tokenizer = ByteLevelBPETokenizer()
    # words are cut after 100 characters: the time grows with the square of their length
    words = (re.sub(r"\S{100}", r"\g<0> ", text) for text in documents)
    options = {"special_tokens": list(special.values()), "show_progress": False}
    tokenizer.train_from_iterator(words, size, min_frequency=0, **options)
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)


def encode(tokenizer, texts, special=False):
    """Token ids of each text, [(n,) int32], without those that a tokenizer puts around it.

    "[MASK]" inside a text is text, or with `special` this token.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding or backend.encode_special_tokens != (not special):
        backend.no_truncation()  # rarely set: it has to wait while another thread uses it
        backend.no_padding()
        backend.encode_special_tokens = not special  # True there: they are text
    ids = []
    for i in range(0, len(texts), 64):  # an encoding takes 100 bytes a token: never hold many
        for encoding in backend.encode_batch_fast(texts[i : i + 64], add_special_tokens=False):
            ids.append(np.array(encoding.ids, np.int32))
    return ids


def encode_documents(tokenizer, texts):
    """Token ids of all texts, joined, a [SEP] behind each: (n,) int32."""
    end = np.array([tokenizer.sep_token_id], np.int32)
    parts = [np.zeros(0, np.int32)]
    for ids in encode(tokenizer, texts):
        parts += [ids, end]
    return np.concatenate(parts)


def frame(tokenizer, rows, length):
    """[CLS] row [SEP] of n rows of ids, cut or padded: tokens (n, length), lengths (n,), int32."""
    tokens = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    tokens[:, 0] = tokenizer.cls_token_id
    sep = tokenizer.sep_token_id
    for i, row in enumerate(rows):
        n = min(len(row), length - 2)
        tokens[i, 1 : n + 1] = row[:n]
        tokens[i, n + 1] = sep
        lengths[i] = n + 2
    return tokens, lengths


def pack(tokenizer, texts, length, rng):
    """Rows {"tokens": (n, length) int32} of the texts, joined, cut from a random start, shuffled.

    There is no padding; less than a row is lost at either end.
    """
    tokens = encode_documents(tokenizer, texts)
    inner = length - 2  # beside [CLS] and [SEP]
    spare = max(len(tokens) - inner, 0)  # tokens beyond a first row
    start = rng.integers(min(inner, spare + 1))
    n = (len(tokens) - start) // inner
    rows = tokens[start : start + n * inner].reshape(n, inner)
    tokens, _ = frame(tokenizer, rng.permutation(rows), length)
    return {"tokens": tokens}


def label_rows(tokenizer, pairs, length, rng):
    """Rows {"tokens": (n, length), "lengths", "targets", "weights": (n,)} of the pairs, shuffled.

    A text is cut or padded.
    """
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    ids = encode(tokenizer, [text for text, _ in pairs], special=True)  # as transformers does
    tokens, lengths = frame(tokenizer, ids, length)
    return {
        "tokens": tokens,
        "lengths": lengths,
        "targets": np.array([label for _, label in pairs], np.int32),
        "weights": np.ones(len(pairs), np.float32),
    }


def batches(corpus, tokenizer, cfg, position=None):
    """Documents -> tokens -> rows -> batches {"tokens": (B, T), ...}, each with the position to
    go on after it. For task classify: pairs -> framed rows -> batches.

    B is this process's share. Ends when a whole epoch has no row.
    """
    start = position or {"window": None, "row": 0, "bad_before": 0}
    skip = start["row"]  # rows of the first window that were given before
    bad = start["bad_before"]  # bad records before that window
    last_epoch = start["window"]["epoch"] if position else -1  # of the last row that was given
    held_out = set(corpus.held_out)
    if cfg.task == "classify":
        held_out = {text for text, _ in corpus.held_out}
    batch = []
    for records, rng, place in common.windows(
        corpus.train,
        cfg.shuffle_buffer,
        seed=cfg.seed,
        position=start["window"],
        **corpus.faults,
    ):
        if place["epoch"] > last_epoch + 1:  # a whole epoch gave no row, nor will the next
            return
        bad_before = bad
        good, bad = good_records(records, corpus.parse, place, bad)
        if cfg.task == "classify":
            pairs = [pair for pair in good if pair and pair[0] not in held_out]
            rows = label_rows(tokenizer, pairs, cfg.seq_len, rng)
        else:
            documents = [text for text in good if text and text not in held_out]
            rows = pack(tokenizer, documents, cfg.seq_len, rng)
        for i in range(skip, len(rows["tokens"])):
            last_epoch = place["epoch"]
            batch.append({name: x[i] for name, x in rows.items()})
            if len(batch) == cfg.batch_size // jax.process_count():
                # a resume parses this window again and counts from bad_before; bad is for the log
                position = {"window": place, "row": i + 1, "bad_before": bad_before, "bad": bad}
                yield jax.tree.map(lambda *x: np.stack(x), *batch), position
                batch = []
        skip = 0


def validation_rows(tokenizer, texts, length, batch_size, mask_fn=None):
    """What loss_sum takes, {name: (batches, batch_size, ...)}: each token of `texts` in a row once,
    under masks that are the same in every run. Without a `mask_fn`, `texts` are pairs.

    The rows that fill up the last batch weigh 0.
    """
    if mask_fn is None:
        rows = label_rows(tokenizer, texts, length, np.random.default_rng(0))
    else:
        tokens = encode_documents(tokenizer, texts)[:-1]  # the frame has the last [SEP]
        starts = range(0, len(tokens), length - 2)
        pieces = [tokens[i : i + length - 2] for i in starts]
        tokens, lengths = frame(tokenizer, pieces, length)
        rows = jax.device_get(jax.jit(mask_fn)(jax.random.key(1), tokens))
        rows["lengths"] = lengths
    expect(rows["weights"].any(), f"--val-docs {len(texts)}: hold no token to predict")
    n = len(rows["tokens"])
    filled = np.arange(round_up(n, batch_size)) % n
    rows = {name: x[filled] for name, x in rows.items()}
    rows["weights"][n:] = 0
    batched = {}
    for name, x in rows.items():
        batched[name] = x.reshape(-1, batch_size, *x.shape[1:])
    return batched


def mask_tokens(key, tokens, tokenizer, *, share=0.15):
    """Hide some of tokens (B, T) -> {"tokens" (B, T), "positions", "targets", "weights" (B, M)}.

    Of n tokens in a row that are not special exactly max(1, round(share n)) are to be predicted:
    80 % become the mask, 10 % any ordinary token, 10 % stay (Devlin et al. 2018). M is enough for
    n = T; where a row needs fewer, the rest of its M places weigh 0.
    """
    B, T = tokens.shape
    where_key, how_key, token_key = jax.random.split(key, 3)
    n = np.arange(T + 1)
    quotas = np.floor(share * n + 0.5)
    quotas = np.maximum(quotas, n > 0).astype(np.int32)
    M = int(quotas[T])
    special = np.unique(tokenizer.all_special_ids)
    ids = list(tokenizer.get_vocab().values())  # they may have gaps
    ordinary = jnp.array(np.setdiff1d(ids, special))

    # the first places of a random order of the ordinary tokens, the special ones behind them
    is_ordinary = jnp.all(tokens[..., None] != special, axis=-1)  # (B, T)
    scores = jnp.where(is_ordinary, jax.random.uniform(where_key, (B, T)), 2)
    positions = jnp.argsort(scores, axis=1)[:, :M]  # (B, M)
    quota = jnp.asarray(quotas)[jnp.sum(is_ordinary, axis=1, keepdims=True)]  # (B, 1)
    weights = (jnp.arange(M) < quota).astype(jnp.float32)  # (B, M)
    targets = jnp.take_along_axis(tokens, positions, axis=1)

    dice = jax.random.uniform(how_key, (B, M))
    random = ordinary[jax.random.randint(token_key, (B, M), 0, len(ordinary))]
    shown = jnp.where(dice < 0.9, random, targets)
    shown = jnp.where(dice < 0.8, tokenizer.mask_token_id, shown)
    shown = jnp.where(weights > 0, shown, targets)
    return {
        "tokens": jnp.put_along_axis(tokens, positions, shown, axis=1, inplace=False),
        "positions": positions,
        "targets": targets,
        "weights": weights,
    }


# ---- model ----


def dropout(x, rate, key):
    """Drop entries of x at a rate; without a key x stays as it is."""
    return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def split_key(key, n):
    """n keys, or n times None."""
    return [None] * n if key is None else jax.random.split(key, n)


def matmul(x, kernel):
    """x (..., C) @ kernel (C, D), as two matrices: of (B, T, C) XLA makes copies on a CPU."""
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], -1)


class Linear(nnx.Linear):
    """nnx.Linear, but the bias is added in float32: bfloat16 cannot hold its gradient's sum."""

    def __init__(self, C_in, C_out, std, dtype, rngs):
        init = nnx.initializers.normal(std)
        super().__init__(C_in, C_out, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        y = matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return (y + self.bias[...]).astype(self.dtype)


def has_fused_attention(q):
    """Whether cuDNN can attend to queries (B, T, H, D): on NVIDIA since Ampere, in bfloat16."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # 9.0, or gfx942 of AMD's
    is_recent = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8
    D = q.shape[-1]
    return bool(is_recent) and q.dtype == jnp.bfloat16 and D % 8 == 0 and D <= 128


def gelu(x):
    return jax.nn.gelu(x, approximate=False)  # by erf; GPT-2's is the tanh one


def is_pre_norm(config):
    return config.model_type == "megatron-bert"


class SelfAttention(nnx.Module):
    def __init__(self, config, dtype, rngs):
        C = config.hidden_size
        std = config.initializer_range
        self.n_head = config.num_attention_heads
        self.attn_pdrop = config.attention_probs_dropout_prob
        self.query = Linear(C, C, std, dtype, rngs)
        self.key = Linear(C, C, std, dtype, rngs)
        self.value = Linear(C, C, std, dtype, rngs)

    def __call__(self, x, lengths=None, key=None):
        B, T, C = x.shape
        q = self.query(x).reshape(B, T, self.n_head, -1)  # (B, T, H, D)
        k = self.key(x).reshape(B, T, self.n_head, -1)
        v = self.value(x).reshape(B, T, self.n_head, -1)
        return self.attend(q, k, v, lengths, key).reshape(B, T, C)

    def attend(self, q, k, v, lengths, key):
        """Queries, keys and values (B, T, H, D) -> (B, T, H, D); each token sees all of its row."""
        has_dropout = key is not None and self.attn_pdrop > 0  # the fused kernel knows none
        if not has_dropout and has_fused_attention(q):
            return jax.nn.dot_product_attention(
                q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
            )
        T = q.shape[1]
        ends = T if lengths is None else lengths[:, None, None, None]  # (B, 1, 1, 1)
        mask = jnp.arange(T) < ends
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores / math.sqrt(q.shape[-1]), -jnp.inf)
        weights = jax.nn.softmax(scores)
        if has_dropout:
            weights = dropout(weights, self.attn_pdrop, key)
        return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)


class Layer(nnx.Module):
    """Attention and MLP; a norm after each, or before each where the config is Megatron's."""

    def __init__(self, config, dtype, rngs):
        C = config.hidden_size
        inner = config.intermediate_size
        epsilon = config.layer_norm_eps
        std = config.initializer_range
        self.hidden_pdrop = config.hidden_dropout_prob
        self.pre_norm = is_pre_norm(config)
        back_std = std  # of what is added to the residual stream
        if self.pre_norm:  # which so keeps its variance (Radford et al. 2019)
            back_std = std / math.sqrt(2 * config.num_hidden_layers)
        # a Dict is a name in the published checkpoints
        self.attention = nnx.Dict({"self": SelfAttention(config, dtype, rngs)})
        self.attention.output = nnx.Dict(dense=Linear(C, C, back_std, dtype, rngs))
        self.intermediate = nnx.Dict(dense=Linear(C, inner, std, dtype, rngs))
        self.output = nnx.Dict(dense=Linear(inner, C, back_std, dtype, rngs))
        norm_1 = nnx.LayerNorm(C, epsilon=epsilon, dtype=dtype, rngs=rngs)
        norm_2 = nnx.LayerNorm(C, epsilon=epsilon, dtype=dtype, rngs=rngs)
        if self.pre_norm:
            self.attention.ln = norm_1
            self.ln = norm_2
        else:
            self.attention.output.LayerNorm = norm_1
            self.output.LayerNorm = norm_2

    def __call__(self, x, lengths=None, key=None):
        attn_key, resid_key, mlp_key = split_key(key, 3)
        y = self.attention.ln(x) if self.pre_norm else x
        y = self.attention.output.dense(self.attention.self(y, lengths, attn_key))
        x = x + dropout(y, self.hidden_pdrop, resid_key)
        x = x if self.pre_norm else self.attention.output.LayerNorm(x)
        y = self.ln(x) if self.pre_norm else x
        y = gelu(self.intermediate.dense(y))
        x = x + dropout(self.output.dense(y), self.hidden_pdrop, mlp_key)
        return x if self.pre_norm else self.output.LayerNorm(x)


class BERT(nnx.Module):
    """BERT (Devlin et al. 2018), its attributes named as in the published checkpoints.

    `config`: BertConfig, or MegatronBertConfig for pre-norm, of transformers. `head`: mlm, classify
    or None. `dtype`: of the computation; parameters are float32.
    model(tokens (B, T) int32, lengths (B,), token_types (B, T)) -> hidden states (B, T, C). Beyond
    its length a row is padding. Dropout only where a key is given.
    """

    def __init__(self, config, *, head="mlm", dtype="float32", remat=False, rngs):
        self.config = nnx.static(config)
        self.head = head
        self.dtype = dtype
        self.remat = remat
        C = config.hidden_size
        V = round_up(config.vocab_size, 128)  # whole tiles; the padding is never seen outside
        positions = config.max_position_embeddings
        epsilon = config.layer_norm_eps
        std = config.initializer_range
        layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        # in float32: bfloat16 cannot hold the summed gradient of a frequent token
        init = nnx.initializers.normal(std)
        embeddings = nnx.Dict(
            word_embeddings=nnx.Embed(V, C, embedding_init=init, rngs=rngs),
            position_embeddings=nnx.Embed(positions, C, embedding_init=init, rngs=rngs),
            token_type_embeddings=nnx.Embed(
                config.type_vocab_size, C, embedding_init=init, rngs=rngs
            ),
        )
        norm = nnx.LayerNorm(C, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.bert = nnx.Dict(embeddings=embeddings, encoder=nnx.Dict(layer=layers))
        if is_pre_norm(config):
            self.bert.encoder.ln = norm
        else:
            self.bert.embeddings.LayerNorm = norm
        if head == "mlm":
            transform = nnx.Dict(dense=Linear(C, C, std, dtype, rngs))
            transform.LayerNorm = nnx.LayerNorm(C, epsilon=epsilon, dtype=dtype, rngs=rngs)
            bias = nnx.Param(jnp.zeros(config.vocab_size))
            self.cls = nnx.Dict(predictions=nnx.Dict(transform=transform, bias=bias))
        if head == "classify":
            self.bert.pooler = nnx.Dict(dense=Linear(C, C, std, dtype, rngs))
            self.classifier = Linear(C, config.num_labels, std, dtype, rngs)

    def __call__(self, tokens, lengths=None, token_types=0, key=None):
        tables = self.bert.embeddings
        encoder = self.bert.encoder
        keys = split_key(key, len(encoder.layer) + 1)
        pos = jnp.arange(tokens.shape[1])[None]
        x = tables.word_embeddings(tokens) + tables.position_embeddings(pos)  # (B, T, C)
        # not by the module: nnx.Embed fails where there is one type
        types = tables.token_type_embeddings.embedding[...]
        x = x + jnp.take(types, jnp.asarray(token_types), axis=0)
        x = x if is_pre_norm(self.config) else tables.LayerNorm(x)
        x = dropout(x.astype(self.dtype), self.config.hidden_dropout_prob, keys[-1])
        for i, layer in enumerate(encoder.layer):
            run = jax.checkpoint(layer.__call__) if self.remat else layer
            x = run(x, lengths, keys[i])
        return encoder.ln(x) if is_pre_norm(self.config) else x

    def mlm_logits(self, hidden):
        """Logits (..., V) float32 of hidden states (..., C); tied to the word embeddings."""
        head = self.cls.predictions
        x = head.transform.LayerNorm(gelu(head.transform.dense(hidden)))
        table = self.bert.embeddings.word_embeddings.embedding[...].astype(x.dtype)
        logits = matmul(x, table.T)[..., : self.config.vocab_size]  # without the padding
        return logits.astype(jnp.float32) + head.bias[...]

    def class_logits(self, hidden, key=None):
        """Logits (B, classes) float32 of hidden states (B, T, C), from the first token."""
        rate = getattr(self.config, "classifier_dropout", None)
        if rate is None:
            rate = self.config.hidden_dropout_prob
        x = jnp.tanh(self.bert.pooler.dense(hidden[:, 0]))  # (B, C)
        return self.classifier(dropout(x, rate, key)).astype(jnp.float32)


def round_up(n, unit):
    return math.ceil(n / unit) * unit


# ---- pretrained weights in and out ----

KINDS = [BertConfig, MegatronBertConfig]
# fields of these that the model follows; others, but for NOT_COMPUTED, must be at their default
FOLLOWED = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "max_position_embeddings", "type_vocab_size", "chunk_size_feed_forward",
}  # fmt: skip

WORDS = "bert.embeddings.word_embeddings.weight"
# tables that are one in the model; files have them under either name, or under both
TIED = {
    "cls.predictions.decoder.weight": WORDS,
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# what a checkpoint may have or lack
OPTIONAL = ("cls.", "classifier.", "bert.pooler.", "bert.embeddings.position_ids")


def checkpoint_names(model):
    """{name in the published checkpoint: parameter}; kernel, scale, embedding are weight there."""
    names = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        names[".".join([*module, "bias" if leaf == "bias" else "weight"])] = param
    return names


def class_names(config):
    return [str(name) for _, name in sorted(config.id2label.items())]


def label_names(classes):
    """Classes as transformers' configs hold them."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def match_classes(theirs, classes):
    """Find `classes` among those of a head: the place of each there, and names for all of them.

    They are matched by name, or by place where one side just counts them; else the places are None.
    """
    if sorted(theirs) == sorted(set(classes)):  # a name that recurs cannot be matched
        return [theirs.index(name) for name in classes], classes
    n = len(classes)
    numbers = [str(i) for i in range(n)]
    counts = (numbers, [f"LABEL_{i}" for i in range(n)])
    if len(theirs) == n and classes in counts:
        return list(range(n)), theirs
    if theirs in counts:
        return list(range(n)), classes
    return None, classes


def read_weights(folder, config):
    """{name: array} of a BERT's folder, with our names and shapes. UsageError where it has none."""
    weights = {}
    for given, w in common.read_weights(folder).items():
        # the oldest files have gamma and beta, and bare encoders no prefix
        name = given.replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        name = TIED.get(name, name)
        if "_embeddings." not in name:
            w = w.T  # kernels are (out, in) there
        if name == WORDS:
            V = config.vocab_size
            expect(len(w) == V, f"{name} has {len(w)} rows, and vocab_size is {V}")
            padding = (0, round_up(V, 128) - V)
            w = np.pad(w, [padding, (0, 0)])
        is_same = np.array_equal(weights.setdefault(name, w), w, equal_nan=True)
        expect(is_same, f"{given} is not {name}; only tied ones are supported")
    return weights


def take_classifier(weights, config, classes):
    """Put the outputs of a classifier in the order of `classes`, and name them in the config.

    Where its classes are others it loses its weights; gives why, else "".
    """
    theirs = class_names(config)
    places, names = match_classes(theirs, classes)
    config.update(label_names(names))
    if places is None:
        del weights["classifier.weight"], weights["classifier.bias"]
        both = [f"{len(some)} ({', '.join(some)[:60]})" for some in (theirs, classes)]
        return "its classes are {}; those of the data are {}".format(*both)
    for name in ("classifier.weight", "classifier.bias"):
        if weights[name].shape[-1] == len(theirs):  # else it is refused, for its shape
            weights[name] = weights[name][..., places]
    return ""


def from_pretrained(
    path, *, head="mlm", classes=None, seed=None, dtype="float32", remat=False, **overrides
):
    """The BERT of a hub id, a folder or a run directory; `overrides` change its config.

    A `head` that the checkpoint lacks is drawn with a `seed`. A classifier's outputs are put in the
    order of the names `classes`. Raises UsageError for what this model would not follow.
    """
    folder = common.snapshot(path, "*.safetensors")
    config = common.read_config(folder, KINDS, FOLLOWED)
    config.update(overrides)
    weights = read_weights(folder, config)
    why_new = ""
    if classes and "classifier.weight" in weights:
        why_new = take_classifier(weights, config, classes)
    elif classes:
        config.update(label_names(classes))

    def create():
        return BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed or 0))

    # without a seed nothing is drawn: every parameter has to come from the files
    model = nnx.eval_shape(create) if seed is None else nnx.jit(create)()
    params = checkpoint_names(model)
    for name in list(weights):
        if name not in params and name.startswith(OPTIONAL):  # of another head
            del weights[name]
    new = common.load_weights(params, weights, OPTIONAL)  # names of those that are drawn
    if new:
        why_new = why_new or f"has no {', '.join(new)}"
        expect(seed is not None, f"{why_new}, so no head for --task {head}")
        print(f"head       new: {why_new}")
    return model


def save_pretrained(model, folder, *parts):
    """Write what transformers' AutoModels read, and what `parts` save: a tokenizer."""
    config = model.config
    weights = {}
    for name, param in checkpoint_names(model).items():
        w = common.to_host(param[...])
        weights[name] = w if "_embeddings." in name else w.T
    weights[WORDS] = weights[WORDS][: config.vocab_size]
    kinds = {"mlm": "ForMaskedLM", "classify": "ForSequenceClassification", None: "Model"}
    family = "MegatronBert" if is_pre_norm(config) else "Bert"
    common.write_pretrained(folder, weights, config, family + kinds[model.head], *parts)


# ---- training ----


def loss_sum(model, batch, key=None):
    """Cross-entropy in nats, summed over the targets by weight, their number, and those guessed.

    Targets are tokens at "positions" (B, M); in a batch without these, classes (B,).
    """
    hidden_key, head_key = split_key(key, 2)
    hidden = model(batch["tokens"], batch.get("lengths"), key=hidden_key)  # (B, T, C)
    if "positions" in batch:
        hidden = hidden.astype(jnp.float32)  # so that no gradient is scattered in bfloat16
        hidden = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)  # (B, M, C)
        logits = model.mlm_logits(hidden)  # (B, M, V)
    else:
        logits = model.class_logits(hidden, head_key)  # (B, classes)
    targets = batch["targets"]
    weights = batch["weights"]
    # a sum in place of a look-up: its gradient is no scatter into all the logits
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    hits = jnp.argmax(logits, axis=-1) == targets
    n = jnp.sum(weights)
    return jnp.sum(nats * weights), n, jnp.sum(hits * weights)


def make_schedule(cfg):
    """Warm-up, then a line to min_lr; with `cooldown` after a plateau (arXiv 2405.18392)."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    fall = max(1, round((cfg.cooldown or 1) * steps))
    fall = min(fall, steps - warm)
    up = optax.linear_schedule(cfg.lr / (warm + 1), cfg.lr, warm)
    flat = optax.constant_schedule(cfg.lr)
    down = optax.linear_schedule(cfg.lr, cfg.min_lr, fall)
    return optax.join_schedules([up, flat, down], [warm, steps - fall])


def make_optimizer(cfg, schedule):
    """AdamW with RoBERTa's betas, or Muon (Jordan 2024) on the hidden matrices.

    Muon is Nesterov momentum 0.95 and five Newton-Schulz steps. Unlike Jordan's it computes in
    float32, corrects the momentum's bias as NAdam does, and its updates have AdamW's size,
    0.2 sqrt(larger dimension) (arXiv 2502.16982).
    """

    def is_decayed(params):  # matrices and embeddings, not biases and norms
        return jax.tree.map(lambda p: p.ndim >= 2, params)

    def kinds(params):
        def kind(path, p):
            is_hidden = path[1].key == "encoder" and p.ndim == 2  # path: bert, encoder, layer, ...
            return "hidden" if is_hidden else "rest"

        return jax.tree_util.tree_map_with_path(kind, params)

    decay = cfg.weight_decay
    rule = optax.adamw(schedule, b1=0.9, b2=0.98, eps=1e-6, weight_decay=decay, mask=is_decayed)
    if cfg.optimizer == "muon":
        muon = optax.contrib.muon(schedule, weight_decay=decay, consistent_rms=0.2)
        rule = optax.partition({"hidden": muon, "rest": rule}, kinds)
    # identity has the state of a clip, so that a resume may change --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    return optax.chain(clip, rule)


def count_microbatches(batch_size, device_rows):
    """As few as cut a batch evenly and leave a device `device_rows` rows at most."""
    devices = jax.device_count()
    expect(batch_size % devices == 0, f"--batch-size {batch_size}: {devices} devices cannot share")
    rows = batch_size // devices
    n = math.ceil(rows / device_rows)
    while rows % n:
        n += 1
    return n


def make_train_step(graphdef, state, accum, schedule, mask_fn=None):
    """jit: (state, batch, key of this step) -> (state, metrics). The state is donated.

    `graphdef` and sharded `state` are of (model, optimizer); `accum` microbatches make a step.
    mask_fn(key, tokens) makes a batch with targets; without it a batch has them.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    mesh = jax.tree.leaves(shardings)[0].mesh
    model_def = nnx.graphdef(nnx.merge(graphdef, state)[0])

    # each device sums the gradients of its own rows; XLA alone would sum over devices in every
    # microbatch
    def gradients(params, batch, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        total = jax.lax.psum(jnp.sum(batch["weights"]), "data")  # targets of the whole step
        total = jnp.maximum(total, 1)

        def cut(x):  # (rows of this device, ...) -> (accum, rows of a microbatch, ...)
            return x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)

        def add_microbatch(sums, rows_and_key):
            rows, key = rows_and_key

            def share_of_loss(params):
                nats, _, _ = loss_sum(nnx.merge(model_def, params), rows, key)
                return nats / total

            return jax.tree.map(jnp.add, sums, jax.value_and_grad(share_of_loss)(params)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        microbatches = (jax.tree.map(cut, batch), jax.random.split(key, accum))
        loss_and_grads, _ = jax.lax.scan(add_microbatch, zeros, microbatches)
        return jax.lax.psum(loss_and_grads, "data")

    specs = {"in_specs": (P(), P("data"), P()), "out_specs": P()}
    gradients = jax.shard_map(gradients, mesh=mesh, check_vma=False, **specs)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch, key):
        model, optimizer = nnx.merge(graphdef, state)
        mask_key, dropout_key = jax.random.split(key)
        if mask_fn is not None:  # all rows at once: the masks are the same with any accum
            batch = mask_fn(mask_key, batch["tokens"])
        loss, grads = gradients(nnx.state(model), batch, dropout_key)
        lr = schedule(optimizer.step[...])
        metrics = {"loss": loss, "lr": lr, "grad_norm": optax.global_norm(grads)}
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    return train_step


def make_evaluate(graphdef, rows, mesh):
    """state -> {"val_loss": nats a target, "val_acc": share guessed} over the rows."""

    @jax.jit
    def eval_step(state, batch):
        model, _ = nnx.merge(graphdef, state)
        return loss_sum(model, batch)

    def evaluate(state):
        parts = []
        for i in range(len(rows["tokens"])):
            batch = {name: x[i] for name, x in rows.items()}
            batch = common.shard_batch(mesh, batch, whole=True)
            # one at a time: two programs that gather parameters can hang on a CPU
            jax.block_until_ready(parts[-1:])
            parts.append(eval_step(state, batch))
        nats, n, hits = np.sum(jax.device_get(parts), axis=0, dtype=np.float64)
        return {"val_loss": float(nats / n), "val_acc": float(hits / n)}

    return evaluate


# ---- use: fill-mask, classes, embeddings ----

forward = nnx.jit(BERT.__call__)


def fill_mask(model, tokenizer, texts, k=5):
    """For each [MASK] in each text the k likeliest [(probability, text with that token there)]."""
    mask = tokenizer.mask_token_id
    texts = [text.replace("[MASK]", tokenizer.mask_token) for text in texts]
    rows = encode(tokenizer, texts, special=True)
    for text, row in zip(texts, rows):
        expect(mask in row, f"--prompt {text!r}: holds no [MASK]")
    longest = max(len(row) for row in rows) + 2
    positions = model.config.max_position_embeddings
    expect(longest <= positions, f"--prompt: {longest} tokens, and there are {positions} positions")
    tokens, lengths = frame(tokenizer, rows, longest)
    hidden = forward(model, tokens, lengths)  # (B, T, C)
    b, t = np.nonzero(tokens == mask)  # (M,): row, place
    logits = model.mlm_logits(hidden[b, t])  # (M, V)
    probabilities, ids = likeliest(logits, k)
    fills = []
    for row, place, p, candidates in zip(b, t, probabilities, ids):
        filled = np.tile(tokens[row, : lengths[row]], (k, 1))  # (k, T)
        filled[:, place] = candidates
        filled = tokenizer.batch_decode(filled[:, 1:-1])  # without [CLS] and [SEP]
        fills.append(list(zip(p, filled)))
    return fills


def classify(model, tokenizer, texts, k=5):
    """For each text, cut at the model's positions, the k likeliest [(probability, class)]."""
    rows = encode(tokenizer, texts, special=True)
    longest = max(len(row) for row in rows) + 2
    longest = min(longest, model.config.max_position_embeddings)
    tokens, lengths = frame(tokenizer, rows, longest)
    logits = model.class_logits(forward(model, tokens, lengths))  # (B, classes)
    names = class_names(model.config)
    found = []
    for p, classes in zip(*likeliest(logits, min(k, len(names)))):
        found.append([(p[i], names[c]) for i, c in enumerate(classes)])
    return found


def likeliest(logits, k):
    """Probabilities and places (B, k) of the k largest of logits (B, V)."""
    return jax.device_get(jax.lax.top_k(jax.nn.softmax(logits), k))


def embed(
    model,
    tokenizer,
    texts,
    *,
    pooling="mean",
    unit=True,
    max_length=None,
    lower=False,
    prompt="",
):
    """Vectors (N, C) of `prompt` + text, cut at max_length tokens: the mean of all, or [CLS]'s."""
    longest = max_length or tokenizer.model_max_length
    longest = min(longest, model.config.max_position_embeddings)
    texts = [prompt + text for text in texts]
    if lower:
        texts = [text.lower() for text in texts]
    rows = encode(tokenizer, texts, special=True)
    cut = sum(len(row) > longest - 2 for row in rows)
    if cut:
        print(f"{cut} of {len(texts)} texts are longer than {longest} tokens and were cut")
    # the longest first: where memory is short it fails at once
    order = np.argsort([-len(row) for row in rows], kind="stable")
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for i in range(0, len(order), 32):
        some = np.resize(order[i : i + 32], 32)  # the last batch repeats some
        width = 1 << (len(rows[some[0]]) + 1).bit_length()  # a power of 2: few sizes to compile
        width = min(longest, max(16, width))
        tokens, lengths = frame(tokenizer, [rows[j] for j in some], width)
        hidden = forward(model, tokens, lengths).astype(jnp.float32)  # (B, T, C)
        if pooling == "cls":
            vectors[some] = hidden[:, 0]
        else:
            is_text = np.arange(width) < lengths[:, None]  # (B, T)
            total = jnp.sum(hidden * is_text[..., None], axis=1)  # (B, C)
            vectors[some] = total / lengths[:, None]
    if unit:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


# settings of sentence-transformers that are followed below, or that change no vector
SETTINGS = {
    "max_seq_length", "do_lower_case", "prompts", "default_prompt_name", "include_prompt",
    "similarity_fn_name", "pooling_mode", "word_embedding_dimension", "embedding_dimension",
    "transformer_task", "modality_config", "module_output_name", "model_type", "__version__",
}  # fmt: skip


def embed_options(cfg):
    """Arguments of `embed`: --pooling, and what sentence-transformers' files in --init-from say.

    Raises UsageError for a setting that would not be followed.
    """
    folder = common.snapshot(cfg.init_from)
    if not (folder / "modules.json").exists():
        return {"pooling": cfg.pooling or "mean"}
    kinds, settings = read_settings(folder)
    limit = settings.get("max_seq_length")
    if limit is not None:
        expect(type(limit) is int and limit > 2, f"max_seq_length is {limit}")

    flags = [name for name, value in settings.items() if value is True]
    flags = [name for name in flags if name.startswith("pooling_mode_")]  # as in ..._mean_tokens
    flagged = "+".join(re.sub("pooling_mode_|_tokens?$", "", name) for name in flags)
    pooling = cfg.pooling or settings.get("pooling_mode") or flagged or "mean"
    expect(pooling in ("mean", "cls"), f"pooling is {pooling}, only mean or cls; see --pooling")

    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    expect(not default or default in prompts, f"default_prompt_name {default} is not in prompts")
    prompt = prompts[default] if default else ""
    known = SETTINGS.union(flags)
    others = [name for name, value in settings.items() if value and name not in known]
    if prompt and not settings.get("include_prompt", True):
        others.append("include_prompt")
    if cfg.mteb and any(prompts.values()):
        others.append("prompts")
    if cfg.mteb and settings.get("similarity_fn_name") not in (None, "cosine"):
        others.append("similarity_fn_name")
    expect(not others, f"{', '.join(others)}: cannot be followed")
    return {
        "pooling": pooling,
        "unit": "Normalize" in kinds,
        "max_length": limit,
        "lower": settings.get("do_lower_case", False),
        "prompt": prompt,
    }


def read_settings(folder):
    """The kinds of modules of a sentence-transformers folder, and the settings of all of them."""
    modules = json.loads((folder / "modules.json").read_text())
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    usual = ["Transformer", "Pooling", "Normalize"]
    is_known = kinds in (usual[:2], usual) and not modules[0]["path"]
    only = "only Transformer at the top, Pooling and Normalize are known"
    expect(is_known, f"modules.json has {', '.join(kinds)}; {only}")
    files = list(folder.glob("sentence_*_config.json"))  # of bert, distilbert, ...
    files += folder.glob("config_sentence_transformers.json")
    files.append(folder / modules[1]["path"] / "config.json")
    settings = {}
    for file in files:
        settings |= json.loads(file.read_text())
    return kinds, settings


def embed_file(cfg, model, tokenizer, options):
    """Write the vectors of the lines of --embed into an .npy beside it, unless there is one."""
    path = Path(cfg.embed)
    out = path.with_suffix(".npy")
    expect(path.is_file() and out != path, f"--embed {path}: no such text file")
    expect(not out.exists(), f"--embed: {out} exists; delete it to replace it")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    expect("\0" not in text, f"--embed {path}: is UTF-16, expected UTF-8")
    lines = text.removesuffix("\n").split("\n")
    vectors = embed(model, tokenizer, lines, **options)
    np.save(out, vectors)
    print(f"{len(vectors):,} vectors of {vectors.shape[1]} are in {out}")


def mteb_scores(cfg, model, tokenizer, options):
    """{task: main score} of the tasks of --mteb."""
    with common.usage_errors("--mteb"):
        import mteb
        from mteb.models import ModelMeta
        from mteb.models.abs_encoder import AbsEncoder

    name = f"nanoflax/{Path(cfg.init_from).resolve().name}"

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"name": name})

        def encode(self, inputs, **_):
            texts = [text for batch in inputs for text in batch["text"]]
            return embed(model, tokenizer, texts, **options)

    with common.usage_errors("--mteb", Exception):  # an unknown name, or what comes of a download
        tasks = mteb.get_tasks(tasks=list(cfg.mteb))
        for task in tasks:
            task.load_data()
    cache = mteb.ResultCache(cfg.out_dir or "out/mteb")  # of all details
    results = mteb.evaluate(Encoder(), tasks, cache=cache, overwrite_strategy="always")
    return {result.task_name: float(result.get_score()) for result in results.task_results}


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    sizes = ["batch_size", "device_rows", "val_docs", "shuffle_buffer", "n_layer", "n_head"]
    sizes += ["n_embd", "log_every", "eval_every", "ckpt_every", "keep"]
    common.expect_each(cfg, sizes, lambda x: x >= 1, "must be at least 1")
    common.expect_each(cfg, ["seq_len"], lambda x: x > 2, "must hold [CLS], [SEP] and a token")
    amounts = ["steps", "lr", "min_lr", "weight_decay", "grad_clip", "warmup_steps", "seed"]
    common.expect_each(cfg, amounts, lambda x: 0 <= x < math.inf, "must be finite, not negative")
    common.expect_each(cfg, ["seed"], lambda x: x < 2**53, "must be below 2**53")
    common.expect_each(cfg, ["dropout"], lambda x: 0 <= x < 1, "must be in [0, 1)")
    common.expect_each(cfg, ["cooldown"], lambda x: 0 <= x <= 1, "must be in [0, 1]")
    common.expect_each(cfg, ["mask_share"], lambda x: 0 < x < 1, "must be in (0, 1)")
    heads = f"--n-embd {cfg.n_embd}: must be divisible by --n-head {cfg.n_head}"
    expect(cfg.n_embd % cfg.n_head == 0, heads)
    is_bpe = (cfg.tokenizer or "").startswith("bpe:")
    expect(not (is_bpe and cfg.init_from), "--tokenizer bpe:N: --init-from knows its own")
    if cfg.steps == 0:
        expect(cfg.init_from, "--steps 0: trains nothing; name a finished model with --init-from")
        expect(not cfg.resume, "--resume: has nothing to do with --steps 0; use --init-from")
    else:
        uses = cfg.prompt or cfg.embed or cfg.mteb
        expect(not uses, "--prompt, --embed and --mteb: need a finished model and --steps 0")


def build(cfg, tokenizer, head, classes=None):
    """The model to start from: that of --init-from, whose sizes it has, or a new one."""
    V = max(tokenizer.get_vocab().values()) + 1
    options = {"head": head, "dtype": cfg.dtype, "remat": cfg.remat}
    changes = {}
    if cfg.dropout is not None or not cfg.init_from:
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        changes = dict.fromkeys(rates, cfg.dropout or 0.0)
    if cfg.resume and common.newest_step(cfg.out_dir) >= 0:  # needs no --init-from
        with common.usage_errors(f"--resume: {cfg.out_dir}"):
            config = common.read_config(common.snapshot(cfg.out_dir), KINDS, FOLLOWED)
        config.update(changes)
    elif cfg.init_from:
        seed = cfg.seed if cfg.steps else None
        with common.usage_errors(f"--init-from {cfg.init_from}"):
            model = from_pretrained(cfg.init_from, classes=classes, seed=seed, **options, **changes)
        known = model.config.vocab_size
        what = f"ids up to {V - 1}, and {cfg.init_from} knows {known}"
        expect(known >= V, f"--tokenizer {cfg.tokenizer or cfg.init_from}: {what}")
        return model
    else:
        kind = MegatronBertConfig if cfg.pre_norm else BertConfig
        config = kind(
            vocab_size=V,
            max_position_embeddings=cfg.seq_len,
            num_hidden_layers=cfg.n_layer,
            num_attention_heads=cfg.n_head,
            hidden_size=cfg.n_embd,
            intermediate_size=4 * cfg.n_embd,
            pad_token_id=tokenizer.pad_token_id,
            **changes,
        )
        if classes:
            config.update(label_names(classes))

    def create():
        return BERT(config, **options, rngs=nnx.Rngs(cfg.seed))

    return nnx.jit(create)()


def count_parameters(module):
    return sum(p.size for p in jax.tree.leaves(nnx.state(module)))


def flops_of_token(model, T, share):
    """FLOPs of training on a token: 6 a parameter of layers and head, and 12 L C T for attention.

    (arXiv 2204.02311, appendix B) The head of masked LM works on a `share` of the tokens.
    """
    config = model.config
    C = config.hidden_size
    n = count_parameters(model.bert.encoder)
    if model.head == "mlm":
        n += share * (C + config.vocab_size) * C
    return 6 * n + 12 * config.num_hidden_layers * C * T


def use(cfg):
    """What --prompt, --embed and --mteb ask of the model in --init-from -> {mteb's task: score}."""
    options = {}
    if cfg.embed or cfg.mteb:
        with common.usage_errors(f"--init-from {cfg.init_from}"):
            options = embed_options(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.init_from, is_new=False)
    model = build(cfg, tokenizer, cfg.task if cfg.prompt else None)
    if cfg.prompt and cfg.task == "classify":
        for text, best in zip(cfg.prompt, classify(model, tokenizer, cfg.prompt)):
            print(text)
            for p, name in best:
                print(f"{p:8.2%}  {name}")
    elif cfg.prompt:
        blocks = []
        for best in fill_mask(model, tokenizer, cfg.prompt):
            lines = [f"{p:6.1%}  {text!r}" for p, text in best]
            blocks.append("\n".join(lines))
        print("\n\n".join(blocks))
    if cfg.embed:
        embed_file(cfg, model, tokenizer, options)
    scores = mteb_scores(cfg, model, tokenizer, options) if cfg.mteb else {}
    for name, score in scores.items():
        print(f"{name} {100 * score:.2f}")
    return scores


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or use. Raises UsageError."""
    check(cfg)
    key = jax.random.key(cfg.seed)
    if cfg.prompt or cfg.embed or cfg.mteb:
        return use(cfg)

    # data: texts to train and to validate on, and the tokenizer
    corpus = open_corpus(cfg)
    documents = corpus.first
    if cfg.task == "classify":
        documents = (text for text, _ in corpus.first)
    tokenizer_name = cfg.tokenizer or cfg.init_from or "bpe:2048"
    if cfg.resume:
        tokenizer_name = cfg.out_dir
    tokenizer = load_tokenizer(tokenizer_name, documents, is_new=not cfg.init_from)
    accum = count_microbatches(cfg.batch_size, cfg.device_rows)
    T = cfg.seq_len
    mask_fn = None
    if cfg.task == "mlm":
        mask_fn = partial(mask_tokens, tokenizer=tokenizer, share=cfg.mask_share)
    val_rows = validation_rows(tokenizer, corpus.held_out, T, cfg.batch_size // accum, mask_fn)

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model = build(cfg, tokenizer, cfg.task, corpus.classes)
    positions = model.config.max_position_embeddings
    tokenizer.model_max_length = positions
    expect(positions >= T, f"--seq-len {T}: the model has {positions} positions")
    schedule = make_schedule(cfg)
    optimizer = nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    # Auto: under explicit axes nnx.Embed and shard_map refuse a cut batch
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, accum, schedule, mask_fn)
    evaluate = make_evaluate(graphdef, val_rows, mesh)
    if cfg.steps == 0:
        result = evaluate(state)
        figures = [f"{name} {value:.4f}" for name, value in result.items()]
        print(*figures, f"on {len(corpus.held_out)} documents")
        return result

    # the run directory, and what a resume must find again
    facts = corpus.facts | {
        "validation texts": common.digest(corpus.held_out),
        "classes": common.digest(corpus.classes),
        "tokenizer": common.digest(tokenizer.backend_tokenizer.to_str()),
    }
    run = common.RunDir("bert", cfg, MAY_CHANGE, facts, [tokenizer, model.config])
    print(f"run        {run.path}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"model      {model.config.model_type},", end=" ")
    print(f"{count_parameters(model) / 1e6:.1f} M parameters, {cfg.dtype}")
    print(f"data       {cfg.data}, validation on {len(corpus.held_out)} documents")
    print(f"tokenizer  {tokenizer_name}, {len(tokenizer):,} tokens")
    print(f"step       {cfg.batch_size} rows x {T} tokens, {accum} microbatches, {cfg.optimizer}")
    flops = flops_of_token(model, T, cfg.mask_share)
    del model, optimizer  # else the first device would keep its own whole copy

    with common.Checkpoints(run.path / "ckpt", cfg.keep) as checkpoints, common.Stop() as stop:
        state, step, position = checkpoints.restore(state)
        log = common.Log(run, cfg, step, "tokens", cfg.batch_size * T, flops)
        stream = common.ahead(batches(corpus, tokenizer, cfg, position), 128, stop)
        for batch, position in islice(log.timed(stream), cfg.steps - step):
            batch = common.shard_batch(mesh, batch)  # tokens (B, T)
            state, metrics = train_step(state, batch, jax.random.fold_in(key, step))
            step += 1
            log.step(step, metrics | {"bad_records": position["bad"]})
            if step % cfg.eval_every == 0 or step == cfg.steps:
                with log.paused():
                    scores = evaluate(state)
                log.flush(scores)  # in the line of this step
            if step % cfg.ckpt_every == 0:
                log.flush()  # raises before a state that is not finite could be saved
                checkpoints.save(step, state, position)
            if stop.requested(step):
                break
        stream.close()
        log.flush()
        checkpoints.save(step, state, position)
        model, _ = nnx.merge(graphdef, state)
        save_pretrained(model, run.path, tokenizer)
    log.close()
    print(f"a Hugging Face model folder is in {run.path}")
    stop.exit(run, step)
    return log.lines[-1]


if __name__ == "__main__":
    common.cli("bert", Config, PRESETS, main, __doc__, FORGET)
