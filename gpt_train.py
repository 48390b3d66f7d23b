"""GPT-2 (Radford et al. 2019) trained from a stream of text, in one file.

    python gpt_train.py --steps 1000      # offline: a small GPT on the source of Python's standard library
    python gpt_train.py --preset gpt2     # GPT-2 124M on FineWeb-Edu, streamed from the Hugging Face hub
    python gpt_train.py --steps 0 --init-from out/gpt-001 --prompt "def main("    # sample from a finished run

Documents are tokenised as they arrive and packed into rows without padding. A run killed at any moment goes
on with --resume, bit for bit. When it ends, its directory is a Hugging Face model folder.

Measured on two CPU cores: the first command reaches 1.54 bits per byte on held-out documents in 4 minutes,
nanoGPT's CPU model on tiny Shakespeare a validation loss of 1.83, and 1.74 in half the steps with Muon.

Shapes: B batch, T tokens, C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import dataclasses
import hashlib
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

END = "<|endoftext|>"  # GPT-2's end token, here also that of the tokenizers we train


@dataclasses.dataclass
class Config:
    preset: Literal["stdlib", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = (
        "stdlib"  # a recipe: other defaults for the flags below
    )
    # data
    data: tuple[str, ...] = ("stdlib",)  # stdlib (Python's source), synthetic, hub ids, files, URLs, folders
    data_name: tuple[str, ...] = ()  # configuration of each hub data set, as in sample-10BT; - for none
    data_weights: tuple[float, ...] = ()  # share of each --data in the rows; equal without
    text_column: str | None = None  # column with the text; found if there is one called text, or only one
    val_data: tuple[str, ...] = ()  # to validate on; else data's validation or test split, or first documents
    val_docs: int = 10  # documents to validate on, never trained on
    tokenizer: str | None = None  # hub id, folder, byte or bpe:N (trained); else init_from's, or bpe:4096
    seq_len: int = 128  # tokens in a row, T
    shuffle_buffer: int = 1_000  # documents whose rows are shuffled together
    retries: int = 8  # times in a row that a source that fails is opened again
    # model
    n_layer: int = 4  # blocks, L
    n_head: int = 2  # attention heads, H
    n_embd: int = 96  # width, C
    dropout: float = 0.0  # on embeddings, attention and residual branches; 0 for pre-training
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 1_000  # optimizer steps; 0 only evaluates, or samples, from init_from
    batch_size: int = 32  # rows a step, over all devices
    accum: int = 2  # microbatches that a step is cut into, to fit in memory, on a CPU in its caches
    optimizer: Literal["adamw", "muon"] = "muon"  # muon is for the hidden matrices; the rest stays on adamw
    lr: float = 1.2e-2  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end, after half a cosine
    warmup_steps: int = 50  # linear, from nothing to lr
    weight_decay: float = 0.1  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, dropout and sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    fsdp: bool = False  # shard parameters and optimizer state over the devices
    # run
    coordinator: str | None = None  # HOST:PORT of process 0 where several train together; auto asks jax
    num_processes: int | None = None  # how many these are; found with auto, SLURM and Open MPI
    process_id: int | None = None  # which of them this one is, from 0
    out_dir: str | None = None  # directory of the run; else the next free out/gpt-001, out/gpt-002, ...
    resume: bool = False  # go on with the run in out_dir, or with the newest one
    overwrite: bool = False  # delete the run in out_dir and start again
    log_every: int = 10  # steps between two lines of metrics.jsonl
    eval_every: int = 250  # steps between two validations, which redraw curves.png
    eval_batches: int = 0  # batches of validation rows; 0 takes all of val_docs
    sample_every: int = 250  # steps between two samples; 0 prints none
    ckpt_every: int = 250  # steps between two checkpoints
    keep: int = 2  # newest checkpoints to keep
    profile: str | None = None  # directory for a trace of steps 10 to 15, for TensorBoard or XProf
    wandb: str | None = None  # project on Weights & Biases to log to
    # use
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # text to go on from; repeatable
    max_new_tokens: int = 100  # tokens in a sample, at most
    temperature: float = 0.8  # above 1 more random, below less; 0 takes the likeliest token
    top_k: int | None = None  # draw among the k likeliest tokens
    top_p: float | None = None  # draw among the likeliest tokens that hold this much probability


# GPT-3's learning rates for these sizes (Brown et al. 2020, table 2.1); 19,073 steps are 10 B tokens
HUB = dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="gpt2")
HUB |= dict(shuffle_buffer=10_000, val_docs=1_000, seq_len=1_024, batch_size=512, steps=19_073)
HUB |= dict(optimizer="adamw", warmup_steps=700, dtype="bfloat16", max_new_tokens=200)
LARGE = HUB | dict(remat=True)
PRESETS = {
    "stdlib": {},
    "gpt2": HUB | dict(n_layer=12, n_head=12, n_embd=768, lr=6e-4, min_lr=6e-5, accum=16),
    "gpt2-medium": HUB | dict(n_layer=24, n_head=16, n_embd=1024, lr=3e-4, min_lr=3e-5, accum=32),
    "gpt2-large": LARGE | dict(n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4, min_lr=2.5e-5, accum=64),
    "gpt2-xl": LARGE | dict(n_layer=48, n_head=25, n_embd=1600, lr=2e-4, min_lr=2e-5, accum=128),
}


# ---- data ----


def load_tokenizer(name, documents=()):
    """The tokenizer called `name`: a hub id, a folder, "byte", or "bpe:N", trained on `documents`."""
    kind, _, size = name.partition(":")
    if kind not in ("byte", "bpe"):
        files = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "config.json"]
        tokenizer = AutoTokenizer.from_pretrained(common.snapshot(name, "--tokenizer", files))
        expect(tokenizer.is_fast, f"--tokenizer {name}: has no fast form (tokenizer.json)")
        expect(tokenizer.eos_token_id is not None, f"--tokenizer {name}: has no end token to join documents")
        return tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes, spelled as GPT-2 spells them
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        size = int(size) if size.isdigit() else 0
        expect(size > 256, f"--tokenizer {name}: expected bpe:N with N above 256, as in bpe:4096")
        how = dict(special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(islice(documents, 10_000), trainers.BpeTrainer(vocab_size=size, **how))
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def encode(tokenizer, texts):
    """Token ids of the texts, the end token after each, as one flat int array."""
    backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    if not backend.encode_special_tokens:  # set once: while another thread encodes, setting has to wait
        backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not its end
        backend.no_truncation()
        backend.no_padding()
    ids = [np.zeros(0, np.uint16 if len(tokenizer) < 1 << 16 else np.int32)]
    for i in range(0, len(texts), 64):  # an encoding takes 100 bytes a token, so never hold many
        chunk = backend.encode_batch_fast(texts[i : i + 64], add_special_tokens=False)
        ids += [np.array([*encoding.ids, eos], ids[0].dtype) for encoding in chunk]
    return np.concatenate(ids)


def pack(tokens, length, rng):
    """Cut a window's tokens (N,) into rows (n, length) from a random start, and shuffle them.

    Nothing is padded and no document is cut short; fewer than 2 length tokens are given up, at the two ends.
    """
    start = rng.integers(min(length, max(len(tokens) - length, 0) + 1))
    tokens = tokens[start : start + (len(tokens) - start) // length * length]
    return rng.permutation(tokens.reshape(-1, length))


def training_rows(source, tokenizer, cfg, held_out, epoch):
    """One epoch of `source`, but for the texts in `held_out`, as rows {"tokens": (T + 1,) int}."""

    def pack_window(batch):
        texts = [text for text in batch["text"] if text not in held_out]
        rng = np.random.default_rng([cfg.seed, epoch, source.rank, batch["record"][0]])
        return {"tokens": pack(encode(tokenizer, texts), cfg.seq_len + 1, rng)}

    return source.map(epoch, cfg.seed, (pack_window, cfg.shuffle_buffer))


def validation_rows(tokenizer, texts, length):
    """Inputs and targets (N, length) int32, every token of `texts` a target once; -1 fills the last row."""
    tokens = np.concatenate([[tokenizer.eos_token_id], encode(tokenizer, texts)]).astype(np.int32)
    short = -(len(tokens) - 1) % length
    inputs, targets = np.pad(tokens[:-1], (0, short)), np.pad(tokens[1:], (0, short), constant_values=-1)
    return inputs.reshape(-1, length), targets.reshape(-1, length)


# ---- model ----


class Linear(nnx.Linear):
    """nnx.Linear, but the bias is added in float32: bfloat16 cannot hold its gradient, a sum over tokens."""

    def __call__(self, x):
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return (y + self.bias[...]).astype(self.dtype)


def linear(fan_in, fan_out, dtype, rngs, std=0.02):
    """A dense layer with GPT-2's init; its kernel is (in, out), as in the published checkpoints."""
    return Linear(fan_in, fan_out, kernel_init=nnx.initializers.normal(std), dtype=dtype, rngs=rngs)


def dropout(x, rate, key):
    """Zero a share `rate` of x and scale up the rest; without a key, that is in evaluation, nothing."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config, dtype, rngs):
        self.n_head, self.attn_pdrop, self.resid_pdrop = config.n_head, config.attn_pdrop, config.resid_pdrop
        self.c_attn = linear(config.n_embd, 3 * config.n_embd, dtype, rngs)
        self.c_proj = linear(config.n_embd, config.n_embd, dtype, rngs, 0.02 / math.sqrt(2 * config.n_layer))

    def __call__(self, x, key=None, cache=None, pos=None):
        B, T, C = x.shape
        attn_key, resid_key = (None, None) if key is None else jax.random.split(key)
        q, k, v = (a.reshape(B, T, self.n_head, -1) for a in jnp.split(self.c_attn(x), 3, axis=-1))
        if cache is not None:  # decoding: put these keys and values beside those of the text so far
            here = jnp.arange(B)[:, None], pos
            k, v = cache[0].at[here].set(k), cache[1].at[here].set(v)  # (B, S, H, D), S positions in all
            seen = jnp.arange(k.shape[1]) <= pos[:, None, :, None]  # (B, 1, T, S)
            y = jax.nn.dot_product_attention(q, k, v, mask=seen)  # (B, T, H, D)
        elif attn_key is not None and self.attn_pdrop > 0:  # the fused kernels know no dropout
            scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
            scores = jnp.where(jnp.tri(T, dtype=bool), scores / math.sqrt(q.shape[-1]), -jnp.inf)
            weights = dropout(jax.nn.softmax(scores), self.attn_pdrop, attn_key)
            y = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)
        else:
            fused = common.attention_kernel(q)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=fused)
        return dropout(self.c_proj(y.reshape(B, T, C)), self.resid_pdrop, resid_key), (k, v)


class MLP(nnx.Module):
    def __init__(self, config, dtype, rngs):
        C, self.resid_pdrop = config.n_embd, config.resid_pdrop
        self.c_fc = linear(C, 4 * C, dtype, rngs)
        self.c_proj = linear(4 * C, C, dtype, rngs, 0.02 / math.sqrt(2 * config.n_layer))

    def __call__(self, x, key=None):
        return dropout(self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True)), self.resid_pdrop, key)


class Block(nnx.Module):
    def __init__(self, config, dtype, rngs):
        norm = partial(nnx.LayerNorm, config.n_embd, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.ln_1, self.attn = norm(rngs=rngs), Attention(config, dtype, rngs)
        self.ln_2, self.mlp = norm(rngs=rngs), MLP(config, dtype, rngs)

    def __call__(self, x, key=None, cache=None, pos=None):
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y, cache = self.attn(self.ln_1(x), attn_key, cache, pos)
        x = x + y
        return x + self.mlp(self.ln_2(x), mlp_key), cache


class GPT(nnx.Module):
    """GPT-2 (Radford et al. 2019), its attributes named as in the published checkpoints.

    `config`: a transformers.GPT2Config. `dtype`: of the computation; parameters are float32.
    model(tokens (B, T) int32) -> logits (B, T, V) float32. Dropout only where a key is given.
    """

    def __init__(self, config, *, dtype="float32", remat=False, rngs):
        self.config, self.remat = nnx.static(config), remat
        init = nnx.initializers.normal(0.02)
        embed = partial(nnx.Embed, features=config.n_embd, embedding_init=init, dtype=dtype, rngs=rngs)
        self.wte = embed(-(-config.vocab_size // 128) * 128)  # whole tiles; the padding is never seen outside
        self.wpe = embed(config.n_positions)
        self.h = nnx.List([Block(config, dtype, rngs) for _ in range(config.n_layer)])
        self.ln_f = nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, tokens, key=None):
        return self.head(self.hidden(tokens, key)[0])

    def hidden(self, tokens, key=None, caches=None, pos=None):
        """tokens (B, T) -> what the head reads (B, T, C), and keys and values (B, T, H, D) of every layer.

        With `caches` (B, S, H, D) and `pos` (B, T): tokens that stand at those positions of a longer text.
        """
        n = len(self.h)
        pos = jnp.arange(tokens.shape[1])[None] if pos is None else pos
        keys = [None] * (n + 1) if key is None else jax.random.split(key, n + 1)
        # looked up in float32 and cast then: in bfloat16 a common token's gradient, a sum over all its
        # places, would stop growing after a few hundred of them
        x = jnp.take(self.wte.embedding[...], tokens, axis=0) + jnp.take(self.wpe.embedding[...], pos, axis=0)
        x = dropout(x.astype(self.wte.dtype), self.config.embd_pdrop, keys[n])  # (B, T, C)
        kv = [None] * n
        for i, block in enumerate(self.h):
            block = jax.checkpoint(block.__call__) if self.remat else block
            x, kv[i] = block(x, keys[i], None if caches is None else caches[i], pos)
        return self.ln_f(x), kv

    def head(self, x):
        """Logits (..., V) float32 of hidden states (..., C); the head is tied to the token embedding."""
        return self.wte.attend(x)[..., : self.config.vocab_size].astype(jnp.float32)


# ---- pretrained weights in and out ----


def checkpoint_names(model):
    """{name in the published checkpoint: parameter}; nnx's kernel, scale and embedding are weight there."""
    names = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        names[".".join([*module, "bias" if leaf == "bias" else "weight"])] = param
    return names


def from_pretrained(path, *, dtype="float32", remat=False, **overrides):
    """The GPT of a hub id, a folder or a run directory; `overrides` change its GPT2Config.

    A smaller n_positions keeps the first ones. Raises UsageError for what is not a GPT-2.
    """
    files = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    folder = common.snapshot(path, "--init-from", files)
    config = common.read_config((GPT2Config,), folder, path)
    config.update(overrides)
    fixed = dict(activation_function="gelu_new", tie_word_embeddings=True)
    for name, value in (fixed | dict(scale_attn_by_inverse_layer_idx=False)).items():
        found = getattr(config, name)
        expect(found == value, f"--init-from {path}: {name} is {found}, only {value} is supported")
    weights = {k.removeprefix("transformer."): w for k, w in common.read_weights(folder, path).items()}
    model = nnx.eval_shape(lambda: GPT(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for name, param in checkpoint_names(state).items():
        expect(name in weights, f"--init-from {path}: {name} is missing")
        w = weights[name].astype(np.float32)
        if name == "wpe.weight":
            w = w[: config.n_positions]
        if name == "wte.weight":
            w = np.pad(w, [(0, -len(w) % 128), (0, 0)])
        expect(w.shape == param.shape, f"--init-from {path}: {name} is {w.shape}, expected {param.shape}")
        param.set_value(jnp.asarray(w))
    nnx.update(model, state)
    return model


def save_pretrained(model, folder, tokenizer=None):
    """Write config.json, model.safetensors and the tokenizer: what GPT2LMHeadModel.from_pretrained reads."""
    weights = {f"transformer.{name}": common.to_host(p[...]) for name, p in checkpoint_names(model).items()}
    if jax.process_index():
        return
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: model.config.vocab_size]
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    GPT2Config.from_dict(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


# ---- loss and optimizer ----

LOGITS = 2**28  # that head_loss makes at once on each device: 1 GB in float32


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_loss(x, embedding, targets, V):
    """Cross-entropy in nats, summed over the targets (B, T) that are not -1, of the head on x (B, T, C).

    Logits (B, T, V) in float32 would be the largest array of all. They are made for a part of T at a time and
    differentiated at once, so that none is made twice (Liger-Kernel, arXiv 2410.10989, section 3.2).
    """
    parts, nats = cut_for_head(x, targets, V)
    return jnp.sum(jax.lax.map(lambda part: nats(part[0], embedding, part[1]), parts))


def cut_for_head(x, targets, V):
    """x and targets cut along T into (n, B, T / n, ...), and the function to apply to such a part."""
    (B, T), most = targets.shape, LOGITS * jax.device_count()
    n = next((n for n in range(1, T) if T % n == 0 and n * most >= B * T * V), T)
    cut = lambda a: a.reshape(B, n, T // n, *a.shape[2:]).swapaxes(0, 1)

    def nats(x, embedding, targets):
        logits = (x @ embedding.astype(x.dtype).T)[..., :V].astype(jnp.float32)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.sum(found * (targets >= 0))

    return (cut(x), cut(targets)), nats


def head_loss_fwd(x, embedding, targets, V):
    parts, nats = cut_for_head(x, targets, V)

    def differentiate(sums, part):
        loss, (dx, dembedding) = jax.value_and_grad(nats, argnums=(0, 1))(part[0], embedding, part[1])
        return jax.tree.map(jnp.add, sums, (loss, dembedding)), dx

    (loss, dembedding), dx = jax.lax.scan(differentiate, (jnp.zeros(()), jnp.zeros_like(embedding)), parts)
    return loss, (dx.swapaxes(0, 1).reshape(x.shape), dembedding)


def head_loss_bwd(V, grads, g):
    dx, dembedding = grads
    return (g * dx).astype(dx.dtype), g * dembedding, None


head_loss.defvjp(head_loss_fwd, head_loss_bwd)


def loss_sum(model, tokens, targets, key=None):
    """Cross-entropy in nats, summed over the targets (B, T) that are not -1, and the number of these."""
    x, _ = model.hidden(tokens, key)
    return head_loss(x, model.wte.embedding[...], targets, model.config.vocab_size), jnp.sum(targets >= 0)


def make_schedule(cfg):
    """Linear warm-up for `warmup_steps`, then a cosine that reaches min_lr at `steps`."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    return optax.warmup_cosine_decay_schedule(cfg.lr / (warm + 1), cfg.lr, warm, steps, cfg.min_lr)


def make_optimizer(cfg, schedule):
    """AdamW, or Muon (Jordan 2024) on the hidden matrices with updates of AdamW's size (arXiv 2502.16982)."""
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


# ---- train and eval step ----


def make_train_step(graphdef, state, accum, schedule):
    """jit: (state, tokens (B, T + 1), key of this step) -> (state, metrics). The state is donated."""

    @partial(jax.jit, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    def train_step(state, tokens, key):
        model, optimizer = nnx.merge(graphdef, state)
        model_def, params = nnx.split(model)
        # a microbatch is every accum-th row, so that devices keep their own rows: (accum, B / accum, T + 1)
        tokens = tokens.astype(jnp.int32).reshape(-1, accum, tokens.shape[1]).swapaxes(0, 1)
        total = jnp.sum(tokens[..., 1:] >= 0)  # a target weighs the same in any microbatch

        def loss_fn(params, tokens, key):
            return loss_sum(nnx.merge(model_def, params), tokens[:, :-1], tokens[:, 1:], key)[0] / total

        def microbatch(sums, batch):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(params, *batch)), None

        if accum == 1:
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens[0], key)
        else:
            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
            (loss, grads), _ = jax.lax.scan(microbatch, zeros, (tokens, jax.random.split(key, accum)))
        metrics = {"loss": loss, "lr": schedule(optimizer.step[...]), "grad_norm": optax.global_norm(grads)}
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    return train_step


def evaluate(eval_step, state, inputs, targets, batch_size, put):
    """Mean loss in nats over every target of the rows (N, T), whatever the batch size."""
    short = -len(inputs) % batch_size  # the last batch is filled up with targets that do not count
    inputs = np.pad(inputs, ((0, short), (0, 0)))
    targets = np.pad(targets, ((0, short), (0, 0)), constant_values=-1)
    sums = []
    for i in range(0, len(inputs), batch_size):
        sums.append(eval_step(state, put(inputs[i : i + batch_size]), put(targets[i : i + batch_size])))
    nats, count = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return float(nats / count)


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


def generate(
    model, tokens, max_new_tokens, *, key, temperature=1.0, top_k=None, top_p=None, lengths=None, eos=None
):
    """Go on from tokens (B, T) with a KV cache -> (B, T + max_new_tokens) int32.

    Row b holds lengths[b] tokens, then padding; its new tokens follow at once. After `eos` there is only eos.
    Raises ValueError beyond the model's positions.
    """
    tokens, positions = jnp.asarray(tokens, jnp.int32), model.config.n_positions
    B, T = tokens.shape
    if T + max_new_tokens > positions:
        raise ValueError(f"{T} + {max_new_tokens} tokens, and the model has {positions} positions")
    lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
    how = max_new_tokens, temperature, top_k, top_p, eos
    return _generate(model, tokens, jnp.asarray(lengths, jnp.int32), key, *how)


@partial(nnx.jit, static_argnums=(4, 5, 6, 7, 8))
def _generate(model, tokens, lengths, key, max_new_tokens, temperature, top_k, top_p, eos):
    B, T = tokens.shape
    rows, fill = jnp.arange(B), 0 if eos is None else eos
    longer = ((0, 0), (0, max_new_tokens))

    def draw(i, out, done, x):  # new token i of each row, from the hidden state (B, C) before it
        new = sample(jax.random.fold_in(key, i), model.head(x), temperature, top_k, top_p)
        new = jnp.where(done, fill, new)
        return out.at[rows, lengths + i].set(new), done | (new == eos)

    def step(carry):
        i, out, done, caches = carry
        pos = (lengths + i - 1)[:, None]  # (B, 1)
        x, caches = model.hidden(jnp.take_along_axis(out, pos, axis=1), caches=caches, pos=pos)
        return i + 1, *draw(i, out, done, x[:, 0]), caches

    x, kv = model.hidden(tokens)
    caches = jax.tree.map(lambda a: jnp.pad(a, (*longer, (0, 0), (0, 0))), kv)  # (B, T + new, H, D)
    out = jnp.where(jnp.arange(T + max_new_tokens) < lengths[:, None], jnp.pad(tokens, longer), fill)
    out, done = draw(0, out, jnp.zeros(B, bool), x[rows, lengths - 1])
    going = lambda carry: (carry[0] < max_new_tokens) & ~carry[2].all()
    return jax.lax.while_loop(going, step, (1, out, done, caches))[1]


def encode_prompts(tokenizer, texts, positions):
    """Token ids of each text; "" begins a new document. UsageError where there is no room for a new token."""
    rows = [encode(tokenizer, [text])[:-1].tolist() or [tokenizer.eos_token_id] for text in texts]
    n = max(map(len, rows), default=0)
    expect(n < positions, f"--prompt: {n} tokens, and there are {positions} positions")
    return rows


def complete(model, tokenizer, prompts, cfg, key):
    """Each prompt with what the model makes of it, as text."""
    positions = model.config.n_positions
    ids = encode_prompts(tokenizer, prompts, positions)
    lengths = [len(i) for i in ids]
    longest = max(lengths)
    new = min(cfg.max_new_tokens, positions - longest)
    if new < cfg.max_new_tokens:
        print(f"{new} new tokens instead of {cfg.max_new_tokens}: the model has {positions} positions")
    tokens = np.array([i + [0] * (longest - len(i)) for i in ids])
    how = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, eos=tokenizer.eos_token_id)
    out = common.to_host(generate(model, tokens, new, key=key, lengths=lengths, **how))
    return [tokenizer.decode(row[: n + new], skip_special_tokens=True) for row, n in zip(out, lengths)]


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    common.check(cfg, "val_docs seq_len shuffle_buffer n_layer n_head n_embd max_new_tokens")
    expect(cfg.n_embd % cfg.n_head == 0, f"--n-embd {cfg.n_embd}: must be divisible by --n-head {cfg.n_head}")
    expect(cfg.temperature >= 0, f"--temperature {cfg.temperature}: must not be negative; 0 is greedy")
    expect(cfg.top_k is None or cfg.top_k > 0, f"--top-k {cfg.top_k}: must be at least 1")
    expect(cfg.top_p is None or 0 < cfg.top_p <= 1, f"--top-p {cfg.top_p}: must be in (0, 1]")
    expect(all(cfg.prompt), "--prompt: is empty; give some text to go on from")


def build(cfg, tokenizer):
    """The model to start from: that of --init-from, or a new one."""
    V, eos = len(tokenizer), tokenizer.eos_token_id
    rates = dict(embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout, resid_pdrop=cfg.dropout)
    if not cfg.init_from:
        sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, n_positions=cfg.seq_len)
        config = GPT2Config(vocab_size=V, bos_token_id=eos, eos_token_id=eos, **sizes, **rates)
        create = lambda: GPT(config, dtype=cfg.dtype, remat=cfg.remat, rngs=nnx.Rngs(cfg.seed))
        return nnx.jit(create)()
    model = from_pretrained(cfg.init_from, dtype=cfg.dtype, remat=cfg.remat, **rates)
    config, default = model.config, Config(**PRESETS[cfg.preset])
    for name in ("n_layer", "n_head", "n_embd"):  # left at the default, they are those of the checkpoint
        asked, found = getattr(cfg, name), getattr(config, name)
        expect(asked in (found, getattr(default, name)), f"{flag(name)} {asked}: {cfg.init_from} has {found}")
    vocabulary = f"{cfg.init_from} has a vocabulary of {config.vocab_size}"
    name = cfg.tokenizer or cfg.init_from
    expect(config.vocab_size >= V, f"--tokenizer {name}: has {V} tokens, and {vocabulary}")
    return model


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or sample. Raises UsageError."""
    check(cfg)
    (key, sampling), mesh = jax.random.split(jax.random.key(cfg.seed)), common.make_mesh()
    if not cfg.steps and cfg.prompt:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.init_from)
        print("\n---\n".join(complete(build(cfg, tokenizer), tokenizer, cfg.prompt, cfg, sampling)))
        return {}

    # the documents to validate on, then the tokenizer
    sources = common.open_data(cfg, {"text": cfg.text_column})
    train, data = [splits["train"] for splits in sources], " ".join((*cfg.data, *cfg.data_name))
    found, val_name = sources, data
    if cfg.val_data:
        found = common.open_data(cfg, {"text": cfg.text_column}, cfg.val_data, "--val-data")
        val_name = " ".join(cfg.val_data)
    held_out = [splits.get("validation", splits.get("test", splits["train"])) for splits in found]
    weights = () if cfg.val_data else cfg.data_weights  # those are the shares of --data
    val_texts = [record["text"] for record in islice(common.mix(held_out, weights), cfg.val_docs)]
    n, val_set = len(val_texts), set(val_texts)
    fewer = "ask for fewer, or give --val-data (a text file is one document)"
    expect(n == cfg.val_docs, f"--val-docs {cfg.val_docs}: {val_name} has only {n} documents; {fewer}")
    documents = lambda: (r["text"] for r in common.mix(train, cfg.data_weights) if r["text"] not in val_set)
    left = f"--val-docs {n}: leaves no document of {data} to train on; {fewer}"
    expect(not cfg.steps or any(documents()), left)
    name = cfg.out_dir if cfg.resume else cfg.tokenizer or cfg.init_from or "bpe:4096"
    tokenizer = load_tokenizer(name, documents())
    val_rows = validation_rows(tokenizer, val_texts, cfg.seq_len)
    tokens_per_byte = np.sum(val_rows[1] >= 0) / sum(len(text.encode()) for text in val_texts)
    inputs, targets = (rows[: cfg.eval_batches * cfg.batch_size or None] for rows in val_rows)

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model, schedule = build(cfg, tokenizer), make_schedule(cfg)
    positions = model.config.n_positions
    expect(cfg.seq_len <= positions, f"--seq-len {cfg.seq_len}: {cfg.init_from} has {positions} positions")
    encode_prompts(tokenizer, cfg.prompt, positions)
    graphdef, state = nnx.split((model, nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, cfg.accum, schedule)
    sums = lambda state, x, y: loss_sum(nnx.merge(graphdef, state)[0], x, y)
    eval_step = jax.jit(sums, out_shardings=common.replicated(mesh))
    put, put_whole = partial(common.shard_batch, mesh), partial(common.shard_whole_batch, mesh)

    def validate(state):
        loss = evaluate(eval_step, state, inputs, targets, cfg.batch_size, put_whole)
        return {"val_loss": loss, "val_bpb": float(loss / math.log(2) * tokens_per_byte)}

    if not cfg.steps:
        result = validate(state)
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {n} documents of {val_name}")
        return result

    # the run directory, the newest checkpoint in it, and the stream from where that was
    def write_folder(folder):
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)

    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
    run = common.Run("gpt", cfg, common.fingerprint(train) | {"tokenizer": digest}, write_folder)
    step, state, position = run.restore(state)
    epochs = [partial(training_rows, source, tokenizer, cfg, val_set) for source in train]
    rows, how = cfg.batch_size // jax.process_count(), dict(seed=cfg.seed, position=position)
    if cfg.data == ("synthetic",):
        columns = {"tokens": ((cfg.seq_len + 1,), 0, len(tokenizer), np.int32)}
        stream = common.synthetic_batches(columns, rows, **how)
    else:
        how |= dict(weights=cfg.data_weights, retries=cfg.retries)
        stream = common.batches(epochs, rows, **how)
    stream = common.Prefetch(stream, depth=128, stop=lambda: run.stop)

    N, T = sum(p.size for p in jax.tree.leaves(nnx.state(model))), cfg.seq_len
    # FLOPs to train on a token: 6 a parameter but for wpe's, 12 L C T for attention (arXiv 2204.02311, B)
    flops = 6 * (N - model.wpe.embedding.size) + 12 * model.config.n_layer * model.config.n_embd * T
    print(f"model      GPT-2, {N / 1e6:.1f} M parameters, {cfg.dtype}")
    print(f"devices    {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"data       {data}, validation on {n} documents of {val_name}")
    print(f"tokenizer  {name}, {len(tokenizer):,} tokens, {1 / tokens_per_byte:.2f} bytes a token")
    print(f"step       {cfg.batch_size} rows x {T} = {cfg.batch_size * T:,} tokens, {cfg.optimizer}")
    print(f"run        {run.dir}, from step {step} to {cfg.steps}", flush=True)
    del model  # with --fsdp, or the first device would keep it whole

    with run.training(step, "tokens", cfg.batch_size * T, flops, stream):
        for batch, position in islice(stream, cfg.steps - step):  # ends early on Ctrl-C or SIGTERM
            state, metrics = train_step(state, put(batch["tokens"]), jax.random.fold_in(key, step))
            step += 1
            run.step(step, state, position, metrics)
            last = step == cfg.steps
            if step % cfg.eval_every == 0 or last:
                with run.pause():
                    result = validate(state)
                run.flush(**result)
            if cfg.sample_every and (step % cfg.sample_every == 0 or last):
                with run.pause():
                    model, sample_key = nnx.merge(graphdef, state)[0], jax.random.fold_in(sampling, step)
                    texts = complete(model, tokenizer, cfg.prompt or [""], cfg, sample_key)
                run.say("\n---\n".join(texts))
            if step % cfg.ckpt_every == 0 or last:
                run.save()
    save_pretrained(nnx.merge(graphdef, state)[0], run.dir, tokenizer)
    print(f"a Hugging Face model folder is in {run.dir}")
    return run.last


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
