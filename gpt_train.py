"""GPT-2 (Radford et al. 2019) trained from a stream of text, in one file.

    python gpt_train.py --steps 1000      # offline: a small GPT on the source of Python's standard library
    python gpt_train.py --preset gpt2     # GPT-2 124M on FineWeb-Edu, streamed from the Hugging Face hub
    python gpt_train.py --steps 0 --init-from out/gpt-001 --prompt "def main("    # sample from a finished run

Documents are tokenised as they arrive and packed into rows without padding. A run killed at any moment goes
on with --resume, bit for bit. When it ends, its directory is a Hugging Face model folder.

Measured on two CPU cores: the first command reaches 1.54 bits per byte on held-out documents in four minutes.

Shapes: B batch, T tokens, C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import dataclasses
import math
import re
from functools import partial
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
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, PreTrainedTokenizerFast

END = "<|endoftext|>"  # GPT-2's end token, here also that of the tokenizers we train


@dataclasses.dataclass
class Config(common.RunConfig):
    # a recipe: other defaults for the flags below
    preset: Literal["stdlib", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "stdlib"
    # data
    data: tuple[str, ...] = ("stdlib",)  # stdlib (Python's source), synthetic, hub ids, files, URLs, folders
    data_name: tuple[str, ...] = ()  # configuration of each hub data set, as in sample-10BT; - for none
    data_weights: tuple[float, ...] = ()  # share of each --data in the rows; equal without
    text_column: str | None = None  # column with the text; found if there is one called text, or only one
    val_data: tuple[str, ...] = ()  # to validate on; else data's validation or test split, or first documents
    val_docs: int = 10  # documents to validate on; they and their copies are never trained on
    tokenizer: str | None = None  # hub id, folder, byte or bpe:N (trained); else init_from's, or bpe:4096
    seq_len: int = 128  # tokens in a row, T
    shuffle_buffer: int = 1_000  # documents whose rows are shuffled together
    # model
    n_layer: int = 4  # blocks, L; with init_from all sizes are its own
    n_head: int = 2  # attention heads, H
    n_embd: int = 96  # width, C
    dropout: float | None = None  # on embeddings, attention and residual branches; else init_from's, or 0
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 1_000  # optimizer steps; 0 only evaluates, or samples, from init_from
    batch_size: int = 32  # rows a step, over all devices
    device_rows: int = 8  # rows that a device takes at once: a CPU's caches like few, a GPU many
    accum: int | None = None  # microbatches in a step; else as few as device_rows allows
    optimizer: Literal["adamw", "muon"] = "muon"  # muon is for the hidden matrices; the rest stays on adamw
    lr: float = 1.2e-2  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end
    cooldown: float = 0.0  # last share of the steps, in which a constant rate falls in a line; 0 is a cosine
    warmup_steps: int = 50  # steps in which the rate rises in a line to lr
    weight_decay: float = 0.1  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, dropout and sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    sample_every: int = 250  # steps between two samples; 0 prints none
    # use
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # text to go on from
    max_new_tokens: int = 100  # tokens in a sample, at most
    temperature: float = 0.8  # above 1 more random, below less; 0 takes the likeliest token
    top_k: int | None = None  # draw among the k likeliest tokens
    top_p: float | None = None  # draw among the likeliest tokens that hold this much probability


# 19,073 steps of 512 x 1,024 tokens are the 10 B tokens of the sample
HUB = dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="gpt2")
HUB |= dict(shuffle_buffer=10_000, val_docs=1_000, seq_len=1_024, batch_size=512, steps=19_073)
HUB |= dict(optimizer="adamw", warmup_steps=700, dtype="bfloat16", max_new_tokens=200)
LARGE = HUB | dict(remat=True)
# learning rates are GPT-3's for these sizes (Brown et al. 2020, table 2.1)
PRESETS = {
    "stdlib": {},
    "gpt2": HUB | dict(n_layer=12, n_head=12, n_embd=768, lr=6e-4, min_lr=6e-5, device_rows=32),
    "gpt2-medium": HUB | dict(n_layer=24, n_head=16, n_embd=1024, lr=3e-4, min_lr=3e-5, device_rows=16),
    "gpt2-large": LARGE | dict(n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4, min_lr=2.5e-5, device_rows=8),
    "gpt2-xl": LARGE | dict(n_layer=48, n_head=25, n_embd=1600, lr=2e-4, min_lr=2e-5, device_rows=4),
}

# flags that may change when a run goes on, beside RunConfig's; another would change what its checkpoint means
FREE = "steps device_rows accum lr min_lr cooldown warmup_steps weight_decay grad_clip dropout remat "
FREE += "sample_every prompt max_new_tokens temperature top_k top_p"


# ---- data ----


def load_tokenizer(name, documents=()):
    """The tokenizer called `name`: a hub id, a folder, "byte", or "bpe:N", trained on `documents`."""
    kind, _, size = name.partition(":")
    if name != "byte" and kind != "bpe":
        tokenizer = common.load_tokenizer(name)
        expect(tokenizer.eos_token_id is not None, f"--tokenizer {name}: has no end token to join documents")
        return tokenizer
    if kind == "byte":
        documents, size = (), "257"  # the 256 bytes and END
    expect(size.isdecimal() and int(size) > 256, f"--tokenizer {name}: expected bpe:N, N above 256")
    tokenizer = ByteLevelBPETokenizer()
    # words are cut after 100 characters: the time grows with the square of their length
    words = (re.sub(r"\S{100}", r"\g<0> ", text) for text in documents)
    tokenizer.train_from_iterator(words, int(size), special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, bos_token=END)


def pack(tokenizer, held_out, length, records, rng):
    """Rows {"tokens": (length,) int32} of the documents {"text": list} but for those held out, shuffled.

    They are joined and cut from a random start, without padding; less than a row is lost at either end.
    """
    texts = [text for text in records["text"] if text not in held_out]
    ids = encode(tokenizer, texts, [tokenizer.eos_token_id], framed=True)
    tokens = np.concatenate([np.zeros(0, np.int32), *ids])
    start = rng.integers(min(length, max(len(tokens) - length, 0) + 1))
    tokens = tokens[start : start + (len(tokens) - start) // length * length]
    return [{"tokens": row} for row in rng.permutation(tokens.reshape(-1, length))]


def validation_rows(tokenizer, texts, length, batch_size):
    """Inputs and targets (batches, batch_size, length) int32, every token of `texts` a target once.

    The rest of the last batch has the target -1, which does not count.
    """
    end = np.array([tokenizer.eos_token_id], np.int32)
    tokens = np.concatenate([end, *encode(tokenizer, texts, end, framed=True)])
    short = -(len(tokens) - 1) % (batch_size * length)
    inputs, targets = np.pad(tokens[:-1], (0, short)), np.pad(tokens[1:], (0, short), constant_values=-1)
    return inputs.reshape(-1, batch_size, length), targets.reshape(-1, batch_size, length)


# ---- model ----

dropout = lambda x, rate, key: nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)  # none without key


class Linear(nnx.Linear):
    """nnx.Linear, but the bias is added in float32: bfloat16 cannot hold its gradient, a sum over tokens."""

    def __call__(self, x):
        y = common.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return (y + self.bias[...]).astype(self.dtype)


class Attention(nnx.Module):
    def __init__(self, config, linear, back):
        C, self.n_head = config.n_embd, config.n_head
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.c_attn, self.c_proj = linear(C, 3 * C), back(C, C)

    def __call__(self, x, key=None, cache=None, pos=None):
        B, T, C = x.shape
        attn_key, resid_key = (None, None) if key is None else jax.random.split(key)
        q, k, v = (a.reshape(B, T, self.n_head, -1) for a in jnp.split(self.c_attn(x), 3, axis=-1))
        rate = 0 if key is None else self.attn_pdrop
        seen = jnp.tri(T, dtype=bool)  # each token those before it
        if cache is not None:  # decoding: put these keys and values beside those of the text so far
            here = jnp.arange(B)[:, None], pos
            k, v = cache[0].at[here].set(k), cache[1].at[here].set(v)  # (B, S, H, D), S positions in all
            seen = jnp.arange(k.shape[1]) <= pos[:, None, :, None]  # (B, 1, T, S)
        if cache is None and rate == 0 and common.has_fused_attention(q):
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        else:  # the fused kernel knows no dropout
            scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
            scores = jnp.where(seen, scores / math.sqrt(q.shape[-1]), -jnp.inf)
            weights = dropout(jax.nn.softmax(scores), rate, attn_key)
            y = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)  # (B, T, H, D)
        y = dropout(self.c_proj(y.reshape(B, T, C)), self.resid_pdrop, resid_key)
        return y, None if cache is None else (k, v)


class Block(nnx.Module):
    """Attention and MLP, a norm before each; `back` makes the layer that ends either."""

    def __init__(self, config, linear, back, norm):
        C, self.resid_pdrop = config.n_embd, config.resid_pdrop
        self.ln_1, self.attn = norm(), Attention(config, linear, back)
        self.ln_2, self.mlp = norm(), nnx.Dict(c_fc=linear(C, 4 * C), c_proj=back(4 * C, C))

    def __call__(self, x, key=None, cache=None, pos=None):
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y, cache = self.attn(self.ln_1(x), attn_key, cache, pos)
        x = x + y
        y = self.mlp.c_proj(jax.nn.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=True))
        return x + dropout(y, self.resid_pdrop, mlp_key), cache


class GPT(nnx.Module):
    """GPT-2 (Radford et al. 2019), its attributes named as in the published checkpoints.

    `config`: a transformers.GPT2Config. `dtype`: of the computation; parameters are float32.
    model(tokens (B, T) int32) -> logits (B, T, V) float32. Dropout only where a key is given.
    """

    def __init__(self, config, *, dtype="float32", remat=False, rngs):
        self.config, self.dtype, self.remat = nnx.static(config), dtype, remat
        C, normal = config.n_embd, nnx.initializers.normal
        linear = partial(Linear, kernel_init=normal(0.02), dtype=dtype, rngs=rngs)  # its kernel is (in, out)
        back = partial(linear, kernel_init=normal(0.02 / math.sqrt(2 * config.n_layer)))
        norm = partial(nnx.LayerNorm, C, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        # in float32: a token is in many places, and bfloat16 cannot hold the sum of their gradients
        embed = partial(nnx.Embed, features=C, embedding_init=normal(0.02), rngs=rngs)
        self.wte = embed(-(-config.vocab_size // 128) * 128)  # whole tiles; the padding is never seen outside
        self.wpe = embed(config.n_positions)
        self.h = nnx.List([Block(config, linear, back, norm) for _ in range(config.n_layer)])
        self.ln_f = norm()

    def __call__(self, tokens, key=None):
        return self.head(self.hidden(tokens, key)[0])[..., : self.config.vocab_size]

    def hidden(self, tokens, key=None, caches=None, pos=None):
        """tokens (B, T) -> (what the head reads (B, T, C), caches).

        In decoding the tokens stand at positions `pos` (B, T) of a longer text, else at 0 ... T - 1. `caches`
        has its keys and values (B, S, H, D), a pair for every layer, and is returned with those of `tokens`.
        """
        n = len(self.h)
        pos = jnp.arange(tokens.shape[1])[None] if pos is None else pos
        keys = [None] * (n + 1) if key is None else jax.random.split(key, n + 1)
        x = (self.wte(tokens) + self.wpe(pos)).astype(self.dtype)  # (B, T, C)
        x = dropout(x, self.config.embd_pdrop, keys[n])
        caches = [None] * n if caches is None else [*caches]
        for i, block in enumerate(self.h):
            block = jax.checkpoint(block.__call__) if self.remat else block
            x, caches[i] = block(x, keys[i], caches[i], pos)
        return self.ln_f(x), caches

    def head(self, x):
        """Logits (..., V padded) float32 of hidden states (..., C), -inf in the padding; tied to wte."""
        logits = common.matmul(x, self.wte.embedding[...].astype(x.dtype).T).astype(jnp.float32)
        ids, V = jnp.arange(logits.shape[-1]), self.config.vocab_size
        return logits if len(ids) == V else jnp.where(ids < V, logits, -jnp.inf)


# ---- pretrained weights in and out ----


def from_pretrained(path, *, dtype="float32", remat=False, **overrides):
    """The GPT of a hub id, a folder or a run directory; `overrides` change its config. Raises UsageError."""
    followed = "vocab_size n_positions n_embd n_layer n_head layer_norm_epsilon "
    followed += "embd_pdrop attn_pdrop resid_pdrop"
    config, stored, _ = common.read_pretrained((GPT2Config,), path, followed)
    config.update(overrides)
    weights, V = {}, config.vocab_size
    for given, w in stored.items():
        # the head is tied to wte: the table is stored under either name, or both
        name = given.removeprefix("transformer.").replace("lm_head.", "wte.")
        if name == "wte.weight":
            expect(len(w) == V, f"{given} has {len(w)} rows, and vocab_size is {V}")
            w = np.pad(w, [(0, -V % 128), (0, 0)])
        if not name.endswith((".attn.bias", ".masked_bias")):  # masks in old files
            same = np.array_equal(weights.setdefault(name, w), w, equal_nan=True)
            expect(same, "lm_head.weight is not wte.weight; only tied ones are supported")
    model = nnx.eval_shape(lambda: GPT(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    common.load_weights(checkpoint_names(model), weights)
    return model


def save_pretrained(model, folder, *parts):
    """Write what GPT2LMHeadModel.from_pretrained reads, and what `parts` save, such as a tokenizer."""
    weights = {f"transformer.{name}": common.to_host(p[...]) for name, p in checkpoint_names(model).items()}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: model.config.vocab_size]
    common.write_pretrained(folder, weights, model.config, "GPT2LMHeadModel", *parts)


# ---- training ----


def loss_sum(model, tokens, targets, key=None):
    """Cross-entropy in nats, summed over the targets (B, T) that are not -1, and the number of these."""
    logits = model.head(model.hidden(tokens, key)[0])  # (B, T, V padded)
    if jax.default_backend() == "cpu":
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    else:  # a sum in place of a look-up: its gradient is no scatter into all the logits
        picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0), axis=-1)
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(targets >= 0, nats, 0)), jnp.sum(targets >= 0)


def make_schedule(cfg):
    """Linear warm-up, then a cosine to min_lr; with `cooldown` a plateau and a line (arXiv 2405.18392)."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    if cfg.cooldown == 0:
        return optax.warmup_cosine_decay_schedule(cfg.lr / (warm + 1), cfg.lr, warm, steps, cfg.min_lr)
    fall = min(max(1, round(cfg.cooldown * steps)), steps - warm)
    up, down = (cfg.lr / (warm + 1), cfg.lr, warm), (cfg.lr, cfg.min_lr, fall)
    parts = optax.linear_schedule(*up), optax.constant_schedule(cfg.lr), optax.linear_schedule(*down)
    return optax.join_schedules(parts, [warm, steps - fall])


def make_optimizer(cfg, schedule):
    """AdamW, or Muon (Jordan 2024: Nesterov momentum 0.95, five Newton-Schulz steps) on the hidden matrices.

    Unlike Jordan's it computes in float32, corrects the momentum's bias as NAdam does, and its updates have
    AdamW's size, 0.2 sqrt(larger dimension) (arXiv 2502.16982).
    """
    decayed = partial(jax.tree.map, lambda p: p.ndim >= 2)  # matrices and embeddings, not biases and norms
    rule = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=cfg.weight_decay, mask=decayed)
    if cfg.optimizer == "muon":
        muon = optax.contrib.muon(schedule, weight_decay=cfg.weight_decay, consistent_rms=0.2)
        kind = lambda path, p: "hidden" if path[0].key == "h" and p.ndim == 2 else "rest"
        kinds = partial(jax.tree_util.tree_map_with_path, kind)
        rule = optax.partition({"hidden": muon, "rest": rule}, kinds)
    # of the same form without, so that a run can go on with another --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    return optax.chain(clip, rule)


def make_train_step(graphdef, state, cfg, schedule):
    """jit: (state, tokens (B, T + 1), key of this step) -> (state, metrics). The state is donated."""
    shardings, accum = jax.tree.map(lambda x: x.sharding, state), common.microbatches(cfg)
    mesh = jax.tree.leaves(shardings)[0].mesh
    model_def = nnx.graphdef(nnx.merge(graphdef, state)[0])  # graphdef is of (model, optimizer)

    # each device sums the gradients of its own rows; XLA alone would sum over devices in every microbatch
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P(), check_vma=False)
    def gradients(params, tokens, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        total = jax.lax.psum(jnp.sum(tokens[:, 1:] >= 0), "data")  # of all devices and microbatches
        # (rows of this device, T + 1) -> (accum, rows of a microbatch, T + 1)
        batches = tokens.reshape(-1, accum, tokens.shape[1]).swapaxes(0, 1)

        def add_microbatch(sums, tokens_and_key):
            tokens, key = tokens_and_key
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            loss_fn = lambda params: loss_sum(nnx.merge(model_def, params), inputs, targets, key)[0] / total
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(params)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        loss_and_grads, _ = jax.lax.scan(add_microbatch, zeros, (batches, jax.random.split(key, accum)))
        return jax.lax.psum(loss_and_grads, "data")

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, tokens, key):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads = gradients(nnx.state(model), tokens, key)
        metrics = {"loss": loss, "lr": schedule(optimizer.step[...]), "grad_norm": optax.global_norm(grads)}
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    return train_step


def make_evaluate(graphdef, rows, tokens_per_byte, mesh):
    """state -> {"val_loss": nats a token, "val_bpb": bits a byte} over every target of the rows."""
    eval_step = jax.jit(lambda state, *batch: loss_sum(nnx.merge(graphdef, state)[0], *batch))

    def evaluate(state):
        parts = [eval_step(state, *common.shard_batch(mesh, batch, whole=True)) for batch in zip(*rows)]
        nats, count = np.sum(jax.device_get(parts), axis=0, dtype=np.float64)
        loss = float(nats / count)
        return {"val_loss": loss, "val_bpb": loss * tokens_per_byte / math.log(2)}

    return evaluate


# ---- sampling ----


def sample(key, logits, temperature, top_k, top_p):
    """Draw one token a row from logits (B, V) -> (B,); first top_k, then top_p (Holtzman et al. 2019)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits)
    # draw among the k likeliest, sorted: masking the whole vocabulary is far slower
    logits, ids = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))  # (B, k)
    if top_p is not None:
        p = jax.nn.softmax(logits)
        logits = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, logits, -jnp.inf)
    return jnp.take_along_axis(ids, jax.random.categorical(key, logits)[:, None], axis=-1)[:, 0]


@partial(nnx.jit, static_argnames=("max_new_tokens", "temperature", "top_k", "top_p", "eos"))
def generate(
    model, tokens, max_new_tokens, *, key, temperature=1.0, top_k=None, top_p=None, lengths=None, eos=None
):
    """Go on from tokens (B, T) with a KV cache -> (B, T + max_new_tokens) int32.

    Row b holds lengths[b] tokens, then padding; its new tokens follow at once. After `eos` there is only eos.
    Raises ValueError beyond the model's positions.
    """
    (B, T), positions = tokens.shape, model.config.n_positions
    if T + max_new_tokens > positions:
        raise ValueError(f"{T} + {max_new_tokens} tokens, and the model has {positions} positions")
    lengths = jnp.full(B, T) if lengths is None else jnp.asarray(lengths)
    rows, fill = jnp.arange(B), 0 if eos is None else eos

    def draw(i, out, done, x):  # new token i of each row, from the hidden state (B, C) before it
        new = sample(jax.random.fold_in(key, i), model.head(x), temperature, top_k, top_p)
        new = jnp.where(done, fill, new)
        return out.at[rows, lengths + i].set(new), done | (new == eos)

    def step(carry):
        i, out, done, caches = carry
        pos = (lengths + i - 1)[:, None]  # (B, 1)
        x, caches = model.hidden(jnp.take_along_axis(out, pos, axis=1), caches=caches, pos=pos)
        return i + 1, *draw(i, out, done, x[:, 0]), caches

    H, D = model.config.n_head, model.config.n_embd // model.config.n_head
    empty = jnp.zeros((B, T + max_new_tokens, H, D), model.dtype)
    caches = [(empty, empty) for _ in model.h]  # keys and values
    x, caches = model.hidden(tokens, caches=caches, pos=jnp.arange(T)[None])
    out = jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, max_new_tokens)))
    out = jnp.where(jnp.arange(T + max_new_tokens) < lengths[:, None], out, fill)
    out, done = draw(0, out, jnp.zeros(B, bool), x[rows, lengths - 1])
    going = lambda carry: (carry[0] < max_new_tokens) & ~carry[2].all()
    return jax.lax.while_loop(going, step, (1, out, done, caches))[1]


def encode_prompts(tokenizer, texts, positions):
    """Token ids of each text; "" begins a new document. UsageError where there is no room for a new token."""
    ids = encode(tokenizer, texts, framed=True, special=True)
    rows = [row.tolist() or [tokenizer.eos_token_id] for row in ids]
    n = max(map(len, rows), default=0)
    expect(n < positions, f"--prompt: {n} tokens, and there are {positions} positions")
    return rows


def complete(model, tokenizer, rows, cfg, key):
    """The text of each of the rows of token ids, and how the model goes on; "---" between two."""
    positions, eos = model.config.n_positions, tokenizer.eos_token_id
    lengths = [len(row) for row in rows]
    new = min(cfg.max_new_tokens, positions - max(lengths))
    if new < cfg.max_new_tokens:
        print(f"{new} new tokens instead of {cfg.max_new_tokens}: the model has {positions} positions")
    tokens = np.array([row + [0] * (max(lengths) - len(row)) for row in rows])
    options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, eos=eos)
    out = common.to_host(generate(model, tokens, new, key=key, lengths=lengths, **options))
    texts = [tokenizer.decode(row[: n + new], skip_special_tokens=True) for row, n in zip(out, lengths)]
    return "\n---\n".join(texts)


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    sizes = "val_docs seq_len shuffle_buffer n_layer n_head n_embd max_new_tokens top_k"
    common.check(cfg, sizes.split(), ["temperature"])
    expect(cfg.n_embd % cfg.n_head == 0, f"--n-embd {cfg.n_embd}: must be divisible by --n-head {cfg.n_head}")
    expect(cfg.top_p is None or 0 < cfg.top_p <= 1, f"--top-p {cfg.top_p}: must be in (0, 1]")
    is_bpe = (cfg.tokenizer or "").startswith("bpe:")
    expect(not (is_bpe and cfg.init_from), "--tokenizer bpe:N: is trained anew; --init-from knows its own")


def build(cfg, tokenizer):
    """The model to start from: that of --init-from, whose sizes it has, or a new one."""
    V, eos = max(tokenizer.get_vocab().values()) + 1, tokenizer.eos_token_id
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), cfg.dropout or 0.0)
    if not cfg.init_from:
        sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, n_positions=cfg.seq_len)
        config = GPT2Config(vocab_size=V, bos_token_id=eos, eos_token_id=eos, **sizes, **rates)
        return nnx.jit(lambda: GPT(config, dtype=cfg.dtype, remat=cfg.remat, rngs=nnx.Rngs(cfg.seed)))()
    rates = {} if cfg.dropout is None else rates
    with common.blame(f"--init-from {cfg.init_from}"):
        model = from_pretrained(cfg.init_from, dtype=cfg.dtype, remat=cfg.remat, **rates)
    name, known = cfg.tokenizer or cfg.init_from, model.config.vocab_size
    fits = known == V if cfg.tokenizer == "byte" else known >= V
    expect(fits, f"--tokenizer {name}: ids up to {V - 1}, and {cfg.init_from} knows {known}")
    return model


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or sample. Raises UsageError."""
    check(cfg)
    (key, sampling), mesh = jax.random.split(jax.random.key(cfg.seed)), common.make_mesh()
    if not cfg.steps and cfg.prompt:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.init_from)
        model = build(cfg, tokenizer)
        prompts = encode_prompts(tokenizer, cfg.prompt, model.config.n_positions)
        print(complete(model, tokenizer, prompts, cfg, sampling))
        return {}

    # data: documents to validate on, the tokenizer, and rows of tokens
    sources = common.open_data(cfg, {"text": cfg.text_column})
    val_texts, documents = common.hold_out_texts(cfg, sources)
    tokenizer_name = cfg.out_dir if cfg.resume else cfg.tokenizer or cfg.init_from or "bpe:4096"
    tokenizer = load_tokenizer(tokenizer_name, documents)
    accum = common.microbatches(cfg)
    val_rows = validation_rows(tokenizer, val_texts, cfg.seq_len, cfg.batch_size // accum)
    tokens_per_byte = np.sum(val_rows[1] >= 0) / sum(len(text.encode()) for text in val_texts)

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model, schedule = build(cfg, tokenizer), make_schedule(cfg)
    positions = tokenizer.model_max_length = model.config.n_positions
    expect(cfg.seq_len <= positions, f"--seq-len {cfg.seq_len}: at most {positions} with {cfg.init_from}")
    prompts = encode_prompts(tokenizer, cfg.prompt or [""], positions)
    graphdef, state = nnx.split((model, nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, cfg, schedule)
    evaluate = make_evaluate(graphdef, val_rows, tokens_per_byte, mesh)
    if not cfg.steps:
        result = evaluate(state)
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {len(val_texts)} documents")
        return result

    # the run directory, its newest checkpoint, and the stream from where that was
    unchanged = {"validation texts": common.digest(val_texts)}
    unchanged["tokenizer"] = common.digest(tokenizer.backend_tokenizer.to_str())
    run = common.Run("gpt", cfg, sources, unchanged, FREE, [tokenizer, model.config])
    state = run.restore(state)
    batches = run.open_batches(sources, partial(pack, tokenizer, {*val_texts}, cfg.seq_len + 1))

    L, C, T = model.config.n_layer, model.config.n_embd, cfg.seq_len
    size = lambda module: sum(p.size for p in jax.tree.leaves(nnx.state(module)))
    # FLOPs to train on a token: 6 a parameter of blocks and head, 12 L C T for attention (arXiv 2204.02311)
    flops = 6 * (size(model.h) + size(model.wte)) + 12 * L * C * T
    print(f"model      GPT-2, {size(model) / 1e6:.1f} M parameters, {cfg.dtype}, on {run.info['devices']}")
    print(f"data       {' '.join((*cfg.data, *cfg.data_name))}, validation on {len(val_texts)} documents")
    print(f"tokenizer  {tokenizer_name}, {len(tokenizer):,} tokens, {1 / tokens_per_byte:.2f} bytes a token")
    size_of_step = f"{cfg.batch_size} rows x {T} = {cfg.batch_size * T:,} tokens"
    print(f"step       {size_of_step}, {accum} microbatches, {cfg.optimizer}")
    del model  # with --fsdp, or the first device would keep it whole

    with run.training(batches, 128, "tokens", cfg.batch_size * T, flops):
        for step, batch in run.steps():
            tokens = common.shard_batch(mesh, batch["tokens"])
            state, metrics = train_step(state, tokens, jax.random.fold_in(key, step))
            run.log(state, metrics)
            if run.due(cfg.eval_every):
                with run.pause():
                    run.flush(evaluate(state))
            if run.due(cfg.sample_every):
                with run.pause():
                    model, sample_key = nnx.merge(graphdef, state)[0], jax.random.fold_in(sampling, step + 1)
                    run.bar.write(complete(model, tokenizer, prompts, cfg, sample_key))
    save_pretrained(nnx.merge(graphdef, state)[0], run.dir, tokenizer)
    return run.end()


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
