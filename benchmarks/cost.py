"""The cost of a training step, by formulas: FLOPs, memory traffic of weights and optimizer, collectives, seconds.

Nothing here is measured. FLOPs follow from the tower's config, collectives from the behaviour of torch's
DistributedDataParallel and DeepSpeed 0.19 with this project's configs; tests compare both with counts. Seconds follow
from the caller's rates. Symbols: F forward FLOPs of one image, P parameters, K updates per step, n attack steps, A
micro-batches per step, N processes, B images per process and micro-batch. GB is 10^9 bytes, a multiply-add is 2 FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import CLIPVisionConfig

from utils.training.metrics import lore_flops_per_image

FLOAT32 = 4  # bytes, also of the parameters and gradients that DDP and DeepSpeed send
STAGES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}

# name: (do updates encode clean images, is there a dual step). TeCoA's class logits, 2 D FLOPs per class, are ignored.
METHODS = {
    "LORE": (True, True),
    "FARE": (False, False),
    "FARE + clean distance": (True, False),
    "TeCoA": (False, False),
    "TeCoA + l2": (True, True),
    "TeCoA + KL": (True, True),
}
# PO of the image tower: the fraction of a step's pictures, the clean ones, that a dual step encodes once more.
PREFERENCES = {"PO image": 0, "PO image + l2": 0.5}  # half of the pictures are clean: one attack per image
PO, PO_L2 = PREFERENCES


@dataclass(frozen=True)
class Tower:
    """The sizes of an image tower that its cost depends on."""

    forward: int  # F, FLOPs of one image
    patch_embedding: int  # c, the part of F in the patch embedding, which stays float32
    attention: int  # a, the part of F in attention's two products, whose factors are both activations
    parameters: int  # P
    tensors: int  # number of parameter tensors
    modules: int  # number of modules that ZeRO-3 gathers; the class embedding comes with the patch embedding
    embed_dim: int


def tower_cost(config: CLIPVisionConfig) -> Tower:
    """Counts a CLIP image tower with its projection.

    d width, m MLP, L blocks, p patch, D embedding, t = (image / p)^2 + 1.
    F = 2 (t - 1) 3 p^2 d + L (8 t d^2 + 4 t^2 d + 4 t d m) + 2 d D: patches, projections of attention, attention, MLP,
    projection. P = d + 3 p^2 d + t d + 4 d + L (4 d^2 + 2 d m + 9 d + m) + d D.
    """
    d, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    patch, embed_dim = config.patch_size, config.projection_dim
    patches = (config.image_size // patch) ** 2
    t = patches + 1
    patch_embedding = 2 * patches * 3 * patch**2 * d
    blocks = layers * (8 * t * d**2 + 4 * t**2 * d + 4 * t * d * m)
    parameters = 5 * d + 3 * patch**2 * d + t * d + layers * (4 * d**2 + 2 * d * m + 9 * d + m) + d * embed_dim
    return Tower(
        forward=patch_embedding + blocks + 2 * d * embed_dim,
        patch_embedding=patch_embedding,
        attention=layers * 4 * t**2 * d,
        parameters=parameters,
        tensors=8 + 16 * layers,
        modules=5 + 8 * layers,
        embed_dim=embed_dim,
    )


def forwards_per_image(method: str, attack_steps: int, primal_steps: int, recompute: bool = False) -> float:
    """FLOPs of one image in one step, as a multiple of F.

    ``METHODS``: 1 + 2 n + 3 K (6 K with clean images) + 1 with a dual step. PO of the image tower has neither n nor K:
    4 per picture (the reference's forward, the policy's forward and backward), or 4.5 with a dual step on the clean
    half. ``recompute``: with gradient checkpointing every backward pass needs one more forward pass. This costs time
    but is not counted in the utilisation.
    """
    if method in PREFERENCES:
        return 4 + PREFERENCES[method] + (1 if recompute else 0)
    clean_in_primal, dual = METHODS[method]
    forwards = lore_flops_per_image(1, attack_steps, primal_steps, clean_in_primal, dual)
    backwards = attack_steps + primal_steps * (2 if clean_in_primal else 1)
    return forwards + (backwards if recompute else 0)


def counted_flops_per_image(tower: Tower, method: str, attack_steps: int, primal_steps: int) -> float:
    """The FLOPs that torch's counter finds: ``forwards_per_image`` * F + n a - c K (2 c K with clean images).

    ``forwards_per_image`` takes a backward pass to the input as F. But both factors of attention's products need a
    gradient, which adds a per attack step, and in an update the pixels need none, which saves c per image.
    """
    flops = forwards_per_image(method, attack_steps, primal_steps) * tower.forward
    if method in PREFERENCES:
        return flops - tower.patch_embedding
    images = 2 if METHODS[method][0] else 1
    return flops + attack_steps * tower.attention - primal_steps * images * tower.patch_embedding


def float32_flops_per_image(tower: Tower, method: str, attack_steps: int, primal_steps: int) -> float:
    """FLOPs of one image in one step that bf16 does not speed up: all passes through the patch embedding.

    c (1 + 2 n + 2 K, 4 K with clean images, + 1 with a dual step).
    """
    if method in PREFERENCES:
        return (3 + PREFERENCES[method]) * tower.patch_embedding
    clean_in_primal, dual = METHODS[method]
    passes = 1 + 2 * attack_steps + 2 * primal_steps * (2 if clean_in_primal else 1) + (1 if dual else 0)
    return passes * tower.patch_embedding


def float32_share_of_time(tower: Tower, flops: float, float32_flops: float, fast: float, slow: float) -> float:
    """Fraction of the time, in [0,1], for the float32 part at ``slow`` FLOP/s, with the rest at ``fast`` FLOP/s."""
    seconds = float32_flops / slow
    return seconds / (seconds + (flops - float32_flops) / fast)


def optimizer_traffic(parameters: int) -> int:
    """Bytes that one AdamW update must move in a device's memory: 28 P.

    A fused kernel reads weights, gradients and two states once and writes weights and states once. torch's foreach
    AdamW moves more.
    """
    return 7 * FLOAT32 * parameters


@dataclass(frozen=True)
class Collective:
    """Messages of one kind in one step. ``message`` is the bytes of one call, those of the full tensor."""

    what: str
    kind: str  # all-reduce, all-gather, reduce-scatter
    calls: int
    message: float  # of one call, on average
    hidden_by: str = "nothing"  # computation that can overlap: backward, update, attack, dual


def sent_bytes(kind: str, message: float, processes: int) -> float:
    """Bytes that one of N processes sends in a ring: 2 (N - 1) / N of the message for all-reduce, else half of that."""
    return message * (2 if kind == "all-reduce" else 1) * (processes - 1) / processes


def bytes_per_step(collectives: list[Collective], processes: int) -> float:
    """Bytes that one process sends in a step."""
    return sum(one.calls * sent_bytes(one.kind, one.message, processes) for one in collectives)


def step_collectives(
    tower: Tower,
    method: str,
    *,
    stage: int,
    processes: int,
    attack_steps: int,
    primal_steps: int,
    accumulation: int = 1,
    gather_for_attack: bool = True,
    reuse_distance: int = 1_000_000_000,
    reduce_bucket_size: int = 50_000_000,
) -> list[Collective]:
    """The collectives of one step without logging, evaluation or saving. Empty for one process.

    Gradients, K times: DDP all-reduces 4 P at the last micro-batch. ZeRO-1 does the same, then all-gathers the updated
    weights, 4 P more: DeepSpeed's default (use_multi_rank_bucket_allreduce) is not a reduce-scatter. ZeRO-2
    all-reduces every micro-batch, because it does not keep whole gradients. ZeRO-3 reduce-scatters every micro-batch.
    Weights under ZeRO-3, in multiples of 4 P per micro-batch: attack 1 (2 n without ``gather_for_attack``), updates
    2 K, dual 1. A weight that is needed again within ``reuse_distance`` elements is kept, which saves the fraction
    min(1, reuse_distance / 2 P) of the gathers in backward passes. Layers are gathered one by one here; in fact,
    prefetching makes fewer and larger calls, and small tensors stay whole, but the bytes are the same.
    The attack of DDP, ZeRO-1 and ZeRO-2 sends nothing.
    """
    if processes == 1:
        return []
    if method in PREFERENCES:
        attack_steps, primal_steps, dual = 0, 1, method == PO_L2
    else:
        dual = METHODS[method][1]
    whole = FLOAT32 * tower.parameters
    updates = primal_steps * (accumulation if stage >= 2 else 1)
    if stage == 0:
        first, further = 2**20, 25 * 2**20  # sizes of DDP's buckets; they end with a tensor, so the number is rough
        buckets = 1 + math.ceil(max(0, whole - first) / further)
    else:
        buckets = math.ceil(tower.parameters / reduce_bucket_size)
    kind = "reduce-scatter" if stage == 3 else "all-reduce"
    found = [Collective("gradients", kind, updates * buckets, whole / buckets, "update" if stage == 3 else "backward")]
    if stage in (1, 2):
        found.append(Collective("updated weights", "all-gather", primal_steps, whole))
    if stage == 3:
        again = max(0.0, 1 - reuse_distance / (2 * tower.parameters))  # fraction gathered again in the backward pass

        def gathers(what: str, passes: float, hidden_by: str) -> Collective:
            calls = round(accumulation * passes * tower.modules)
            return Collective(what, "all-gather", calls, accumulation * passes * whole / max(1, calls), hidden_by)

        if attack_steps and gather_for_attack:
            found.append(
                Collective("weights, attack", "all-gather", accumulation * tower.tensors, whole / tower.tensors)
            )
        elif attack_steps:
            found.append(gathers("weights, attack", attack_steps * (1 + again), "attack"))
        found.append(gathers("weights, updates", primal_steps * (1 + again), "update"))
        if dual:
            found.append(gathers("weights, dual", 1, "dual"))
    if stage:
        found.append(Collective("overflow flag or norm", "all-reduce", primal_steps, 8 if stage == 3 else 4))
    if dual:  # the network has two linear layers, hidden size 512: four tensors, one call each
        found.append(
            Collective("multiplier's gradients", "all-reduce", 4, FLOAT32 * (512 * tower.embed_dim + 1025) / 4)
        )
    if method in PREFERENCES:
        found.append(Collective("row counts", "all-reduce", 1, 8))
    found.append(Collective("stop flag", "all-gather", 1, 8 * processes))
    return found


@dataclass(frozen=True)
class Network:
    """Rates of one device in bytes per second, and seconds per hop. The defaults are assumptions, not measurements."""

    per_node: int = 8
    inside: float = 300e9  # to other devices of its machine
    between: float = 50e9  # by its network adapter: 400 Gb/s
    latency: float = 10e-6

    def bandwidth(self, processes: int, spread: bool = True) -> float:
        """The bandwidth at which a device sends.

        Across machines, the best case (``spread``) is a ring over all adapters of a machine, each with 1 / per_node of
        the bytes: min(inside, per_node * between). In the worst case every byte goes through one adapter, at
        ``between``.
        """
        if processes <= self.per_node:
            return self.inside
        return min(self.inside, self.between * (self.per_node if spread else 1))

    def seconds(self, collective: Collective, processes: int, spread: bool = True) -> float:
        """Seconds of all calls: bytes sent / bandwidth, plus ceil(log2 N) hops per call, for all-reduce twice that."""
        hops = math.ceil(math.log2(processes)) * (2 if collective.kind == "all-reduce" else 1)
        sent = sent_bytes(collective.kind, collective.message, processes)
        return collective.calls * (sent / self.bandwidth(processes, spread) + hops * self.latency)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: computation, all communication, and the communication that cannot overlap."""

    compute: float
    communication: float
    exposed: float

    @property
    def without_overlap(self) -> float:
        return self.compute + self.communication

    @property
    def with_overlap(self) -> float:
        return self.compute + self.exposed


def step_time(
    tower: Tower,
    method: str,
    *,
    rate: float,
    batch_size: int,
    stage: int,
    processes: int,
    attack_steps: int,
    primal_steps: int,
    network: Network,
    accumulation: int = 1,
    spread: bool = True,
) -> StepTime:
    """Seconds of a step at ``rate``, the model FLOP/s that a single device sustains in whole steps.

    The rate is assumed equal at every batch size, which is wrong for a few images. With ideal overlap, the reduction of
    gradients hides behind its backward pass (2/3 of an update's FLOPs), except its last bucket; ZeRO-3's gathers and
    reductions hide behind the whole update. The all-gathers of ZeRO-1 and ZeRO-2 and before an attack cannot be hidden.
    """
    collectives = step_collectives(
        tower,
        method,
        stage=stage,
        processes=processes,
        attack_steps=attack_steps,
        primal_steps=primal_steps,
        accumulation=accumulation,
    )
    forward = batch_size * tower.forward / rate
    compute = accumulation * forward * forwards_per_image(method, attack_steps, primal_steps)
    updates = 1 if method in PREFERENCES else primal_steps
    update = forward * 3 * (2 if method not in PREFERENCES and METHODS[method][0] else 1)
    reductions = updates * (accumulation if stage >= 2 else 1)
    windows = {
        "nothing": 0.0,
        "backward": reductions * update * 2 / 3,
        "update": updates * accumulation * update,
        "attack": accumulation * 2 * attack_steps * forward,
        "dual": accumulation * forward * PREFERENCES.get(method, 1),
    }
    total = exposed = 0.0
    for hidden_by, window in windows.items():
        waiting = [one for one in collectives if one.hidden_by == hidden_by]
        seconds = sum(network.seconds(one, processes, spread) for one in waiting)
        last = 0.0  # the last bucket is sent when the backward pass is over
        for one in waiting:
            if one.what == "gradients":
                last = network.seconds(one, processes, spread) * reductions / one.calls
        total += seconds
        exposed += max(seconds - window, last)
    return StepTime(compute, total, exposed)


def hidden_batch_size(
    tower: Tower, *, rate: float, processes: int, network: Network, images: int = 2, spread: bool = True
) -> float:
    """The smallest batch per device at which DDP's all-reduce takes no longer than the backward pass.

    B = 8 P (N - 1) / N / bandwidth * rate / (2 F images), where an update encodes each image ``images`` times (LORE 2).
    """
    seconds = sent_bytes("all-reduce", FLOAT32 * tower.parameters, processes) / network.bandwidth(processes, spread)
    return seconds * rate / (2 * images * tower.forward)


def furthest_move(steps: int, learning_rate: float, updates_per_step: int = 1) -> float:
    """About how far AdamW can move one weight in a run with a cosine schedule: sum of the rates, updates * rate / 2.

    AdamW's step is at most about the learning rate if the gradient keeps its sign, whatever the gradient's size.
    """
    return steps * updates_per_step * learning_rate / 2
