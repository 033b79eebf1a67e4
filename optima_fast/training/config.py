"""Settings of a run: one dataclass whose fields are the flags and the YAML keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optima_fast import bandit
from optima_fast.bandit import GaussianThompson, Greedy
from optima_fast.distill import arm_space, maps, matching, parse_arm, parse_reward
from optima_fast.distill.arms import ARM_SPACES
from optima_fast.distill.recipes import RECIPES
from optima_fast.distill.reward import COSINE, HEADROOM, OF_EVERY_ARM
from optima_fast.distill.weights import by_layer
from optima_fast.errors import UserError
from optima_fast.losses import HIDDEN_LOSSES, QUEUED, UNPROJECTED
from optima_fast.models import MODULES, presets
from optima_fast.tasks import tokenizers
from optima_fast.tasks.augment import RandAugment
from optima_fast.training import policies

MAX_THREADS = 1024

METHODS = (
    *("headroom", "optima", "gradient-cosine", "layerwise", "balanced", "random", "fixed", "kd"),
    "finetune",
)
# where modules are chosen each round by what is measured: the method's policy and reward
CHOICES = {
    "headroom": {"policy": Greedy.name, "reward": HEADROOM},
    "optima": {"policy": GaussianThompson.name, "reward": "drop"},
    "gradient-cosine": {"policy": Greedy.name, "reward": COSINE},
}
# settings that only these methods look at
OF_A_CHOICE = ("policy", "reward", "reward_cost", "gamma", "variance_scale", "init_rounds")
TASKS = ("vqa", "snli_ve", "nlvr2", "coco")
SOFT_LABELS = ("kl", "bce")
CACHE_DTYPES = ("bf16", "fp32")
REWARD_SPLITS = ("train", "held-out")

_POSITIVE = (
    *("steps", "round_steps", "reward_examples", "train_images", "batch_size", "lr", "head_lr"),
    *("image_size", "relation_heads", "negatives", "hidden_temperature"),
    *("clip", "teacher_lr", "teacher_head_lr", "teacher_batch_size"),
    *("log_every", "eval_every", "checkpoint_every", "accumulate", "max_hours"),
    "teacher_cache_gb",
)
_NOT_NEGATIVE = (
    *("init_rounds", "variance_scale", "warmup_steps", "weight_decay", "prediction_weight"),
    *("teacher_steps", "kl_weight", "seed", "teacher_seed", "data_seed", "threads"),
    "reward_memory",
)


def _field(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. ``None`` means the default for the task and data at hand.

    ``recipe`` is a name for what other settings hold: :func:`optima_fast.training.flags.parse`
    fills them in.
    """

    task: str = _field("vqa", "the task to distil on", TASKS)
    data: str = _field("digits", "digits (built in), or a folder in the task's official layout")
    method: str = _field(
        "headroom",
        "which modules are distilled: headroom, those with most left to teach for their cost; "
        "optima, those that the paper's bandit picks; gradient-cosine, those whose gradient agrees "
        "with the task's on a batch; layerwise, all; balanced, all, each module's loss and the "
        "task's divided by its running mean; random, a subset drawn anew each round; fixed, those "
        "of --arm; kd, none, only the teacher's logits; finetune, none, without a teacher",
        METHODS,
    )
    arm: str | None = _field(
        None, "the modules of --method fixed, such as image+text or image[1-3]"
    )
    recipe: str | None = _field(
        None,
        "use the losses of another system, on all modules unless --method says otherwise; a "
        "setting given as well overrides the recipe's; optima_fast.doctor describes each",
        tuple(RECIPES),
    )
    arms: str = _field(
        "modules",
        "what is chosen among: subsets of modules, single modules, or subsets of groups of their "
        "layers",
        ARM_SPACES,
    )
    policy: str | None = _field(
        None, f"the bandit of --method optima: {', '.join(policies.choices())}; default thompson"
    )
    reward: str | None = _field(
        None,
        "what --method optima rewards: drop (of KL, hidden and attention losses, Eq. 6), "
        "normalised (every layer alike), headroom, gradient-cosine, or a list of "
        "kl,hidden,attention,prediction; default drop",
    )
    reward_clip: bool = _field(True, "count a loss that rose as 0, not as a negative drop")
    reward_cost: str | None = _field(
        None,
        "flops divides the reward by the arm's arithmetic; default flops for headroom, else none",
        ("none", "flops"),
    )
    reward_split: str = _field(
        "train",
        "where the reward's examples come from; held-out ones are not trained on",
        REWARD_SPLITS,
    )

    teacher: str | None = _field(
        None,
        "a preset or a checkpoint such as hf-hub:ORG/NAME, which is trained on the task first, or "
        "a run folder, whose student teaches",
    )
    student: str | None = _field(None, "a preset, or a checkpoint or run folder to train further")
    stages: str | None = _field(
        None,
        "distil in stages: a list of students, each of which teaches the next, such as "
        "coca_tiny12,coca_tiny6",
    )
    student_init: str | None = _field(
        None, "where the student's weights start: teacher, random, a checkpoint or a run folder"
    )
    tokenizer: str | None = _field(
        None,
        "clip, sentencepiece, words or a FILE.model; default that of the teacher or checkpoint, "
        "else sentencepiece; on digits words",
    )
    image_size: int | None = _field(None, "side of an image in pixels; default the teacher's")
    dropout: float = _field(0.0, "dropout before the task's classifier")

    steps: int | None = _field(None, "number of optimizer steps")
    round_steps: int | None = _field(None, "P, steps of a round; each round chooses modules anew")
    init_rounds: int | None = _field(None, "T0, pulls of each arm before the bandit chooses")
    gamma: float | None = _field(None, "the share of the bandit's memory that a round keeps")
    variance_scale: float | None = _field(
        None, "a factor on the variance that the bandit samples with"
    )
    reward_examples: int | None = _field(None, "how many examples the reward is measured on")
    reward_memory: float = _field(
        2.0,
        "GiB of device memory for the teacher's outputs on these examples; where that is too "
        "little, the teacher runs again in every round",
    )

    train_images: int | None = _field(
        None, "digits: how many training images to draw; a tenth as many are drawn to test on"
    )
    extra_images: str | None = _field(
        None,
        "coco: a folder of further images without captions; the teacher captions them once, "
        "greedily, and the student trains on them too",
    )
    augment: str | None = _field(
        None,
        "RandAugment of training images: none (or off), or LAYERS,MAGNITUDE; it is "
        "1,10 on folders of vqa and snli_ve unless you say otherwise",
    )
    image_errors: str = _field(
        "fail",
        "what to do about an image that cannot be read: fail, or skip its examples",
        ("fail", "skip"),
    )
    batch_size: int | None = _field(
        None, "images (nlvr2: sentences) in a step, of all processes together"
    )
    lr: float | None = _field(None, "peak learning rate")
    head_lr: float | None = _field(None, "peak learning rate of the task's head; default --lr")
    warmup_steps: int | None = _field(None, "steps of linear warm-up")
    weight_decay: float = _field(0.1, "decoupled weight decay")
    clip: float = _field(1.0, "largest gradient norm")
    hidden_weight: float | Mapping[str, Any] = _field(
        1.0,
        "a2, weight of the hidden-state losses: a number, or YAML by module, such as {image: 0.1, "
        "text: [0, 1], multimodal: {last: 1}}: one for all layers, one for each, or the last alone",
    )
    attention_weight: float | Mapping[str, Any] = _field(
        1e-2,
        "a3, weight of the attention losses, likewise; the key cross is that of --cross-attention",
    )
    prediction_weight: float = _field(1.0, "weight of the task's own loss")
    soft_labels: str = _field(
        "kl",
        "how the student's logits are compared with the teacher's: by kl, or for vqa by bce with "
        "its probabilities",
        SOFT_LABELS,
    )
    kl_weight: float | None = _field(
        None, "a1, weight of that comparison; default 1 for kd, else 0"
    )
    attention_loss: str = _field(
        "scores",
        "how attention is compared: the mean over heads; each head (-each); each head where both "
        "models have as many, else the mean (-auto); or relations among queries and among keys",
        maps.NAMES,
    )
    attention_scale: str = _field(
        "none", "length multiplies an attention loss by its number of keys", maps.SCALES
    )
    relation_heads: int | None = _field(None, "number of heads of --attention-loss relations")
    hidden_loss: str = _field("mse", "how hidden states are compared", tuple(HIDDEN_LOSSES))
    negatives: int = _field(
        4096, "how many teacher tokens of earlier steps --hidden-loss contrastive keeps"
    )
    hidden_temperature: float = _field(0.07, "temperature of --hidden-loss contrastive")
    hidden_scale: str = _field(
        "none", "variance divides a hidden loss by the teacher's variance", ("none", "variance")
    )
    reduction: str = _field("sum", "how the losses of the layers are put together", ("sum", "mean"))
    layer_mapping: str = _field(
        "even",
        "which teacher layer each student layer learns from: even spreads them, last from last; "
        "reversed turns that round; random is drawn from --seed",
        matching.MAPPINGS,
    )
    cross_attention: bool = _field(False, "match the decoder's cross-attention too")
    cross_both_ways: bool = _field(
        False, "with --cross-attention, also match what the image tokens see of the text"
    )

    teacher_steps: int | None = _field(
        None,
        "optimizer steps of the teacher's own training; 0 takes a captioning checkpoint as it is",
    )
    teacher_lr: float | None = _field(None, "the teacher's peak learning rate")
    teacher_head_lr: float | None = _field(None, "that of the teacher's head; default --teacher-lr")
    teacher_batch_size: int | None = _field(None, "images in a step of the teacher's training")
    cell_stage: float = _field(
        0.0, "digits: the share of steps, at the start, that train the image encoder to name digits"
    )

    seed: int = _field(0, "seed of the student's start, the order of batches and the bandit")
    teacher_seed: int = _field(0, "seed of the teacher's own training")
    data_seed: int = _field(0, "seed of the built-in data")
    device: str = _field("auto", "auto, cpu, cuda or cuda:N")
    compile: str = _field("auto", "torch.compile: auto is on for CUDA only", ("auto", "on", "off"))
    precision: str = _field("auto", "auto is bf16 on CUDA, else fp32", ("auto", "fp32", "bf16"))
    threads: int = _field(0, "CPU threads; 0 is one per core that this process may use")
    workers: str = _field(
        "auto",
        "processes that read images; auto is none for digits, else all usable cores but one",
    )
    accumulate: int = _field(
        1, "parts of a batch that a process takes one after the other, to save memory"
    )
    recompute: bool = _field(
        False, "activation checkpointing: compute the student's layers again in the backward pass"
    )
    fsdp: bool = _field(False, "with torchrun: shard student and teacher over the processes")
    keep: str = _field(
        "last",
        "which student is kept: the last, or the best on the validation split",
        ("last", "best"),
    )
    max_hours: float | None = _field(
        None, "save and stop this many hours after the command began; the same command goes on"
    )
    track: str = _field(
        "none",
        "send the lines of metrics.jsonl to this service too",
        ("none", "tensorboard", "wandb"),
    )
    log_every: int | None = _field(None, "steps between lines of metrics.jsonl")
    eval_every: int | None = _field(None, "steps between measurements on the validation split")
    checkpoint_every: int | None = _field(None, "steps between checkpoints")
    out: str | None = _field(None, "the run's folder; default runs/TASK-METHOD-seedSEED")
    cache: str | None = _field(
        None, "the folder for trained teachers; default ~/.cache/optima_fast"
    )
    teacher_cache: str | None = _field(
        None,
        "a folder for the teacher's outputs on each training example, for later epochs and runs; "
        "needs --augment none",
    )
    teacher_cache_dtype: str = _field(
        "bf16",
        "the dtype of these outputs; bf16 is half the size, fp32 is not rounded",
        CACHE_DTYPES,
    )
    teacher_cache_gb: float = _field(50.0, "the most gigabytes that folder may hold")
    resume: str = _field(
        "auto", "whether to go on with a run: auto, never, or the folder of the run"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = field.metadata["choices"]
            if choices is not None and value not in (None, *choices):
                raise UserError(
                    f"{flag(field.name)} must be one of {', '.join(choices)}, got {str(value)!r}"
                )
        self._check_numbers()
        self._check_weights()
        if self.reward == HEADROOM and self.reward_cost == "none":
            raise UserError(
                "--reward headroom is per cost, or all modules would always be best: leave out "
                "--reward-cost none"
            )
        if self.reward not in (None, *OF_EVERY_ARM):
            parse_reward(self.reward)
        if self.rewarded and COSINE in (self.method, self.reward):
            self._check_cosine()
        self._check_choice()
        if self.recipe is not None and self.method == "finetune":
            raise UserError(f"--recipe {self.recipe} needs a teacher: leave --method finetune out")
        if self.extra_images is not None and (self.task != "coco" or self.method == "finetune"):
            raise UserError(
                f"--extra-images {self.extra_images} is for --task coco and a method with a "
                f"teacher, not for --task {self.task} --method {self.method}"
            )
        if self.recipe == "minivlm" and self.extra_images is None:
            raise UserError("--recipe minivlm needs --task coco and --extra-images FOLDER")
        if self.soft_labels == "bce" and self.task != "vqa":
            raise UserError(f"--soft-labels bce is for --task vqa, not for --task {self.task}")
        if self.stages is not None and (self.student is not None or self.method == "finetune"):
            raise UserError(
                f"--stages {self.stages} names the students of a teacher: leave --student and "
                "--method finetune out"
            )
        if self.method == "fixed":
            if self.arm is None:
                raise UserError("--method fixed needs --arm, such as --arm image+text")
            parse_arm(self.arm, MODULES)
        elif self.arm is not None:
            raise UserError(f"--arm {self.arm} is for --method fixed, not --method {self.method}")
        if self.device != "auto" and self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.cell_stage and (self.method != "finetune" or self.data != "digits"):
            raise UserError(
                f"--cell-stage {self.cell_stage} is for --method finetune on the digits, not for "
                f"--method {self.method} on {self.data}"
            )
        if self.data == "digits":
            self._check_digits()
        augmented = self.augment is not None and RandAugment.parse(self.augment) is not None
        if self.teacher_cache is not None:
            self._check_teacher_cache(augmented)
        if self.tokenizer is not None:
            tokenizers.check(self.tokenizer)
        if self.workers != "auto" and not (
            self.workers.isdecimal() and int(self.workers) <= MAX_THREADS
        ):
            raise UserError(
                f"--workers must be auto or a number from 0 to {MAX_THREADS}, got {self.workers!r}"
            )
        for name in ("seed", "teacher_seed", "data_seed"):
            if getattr(self, name) >= 2**63:
                raise UserError(f"{flag(name)} must be below 2**63, got {getattr(self, name)}")
        if self.threads > MAX_THREADS:
            raise UserError(f"--threads must be at most {MAX_THREADS}, got {self.threads}")

    @property
    def rewarded(self) -> bool:
        """Whether rewards are measured, for what chooses the modules of each round."""
        return self.method in CHOICES

    def check_arms(self, layer_counts: Mapping[str, int]) -> None:
        """Raise unless the arm or the bandit's first rounds go with a student of these layers.

        The settings must be resolved.

        Raises:
            UserError: no such arm, or too few rounds.
        """
        if self.arm is not None:
            parse_arm(self.arm, layer_counts)
        if self.rewarded:
            self._check_rounds(layer_counts)

    def _check_choice(self) -> None:
        """Refuse a policy that there is not, or another choice than the method's own."""
        if self.policy is not None and not bandit.gone(self.policy):
            known = policies.choices()
            if self.policy not in known:
                raise UserError(f"--policy must be one of {', '.join(known)}, got {self.policy!r}")
        if self.method in CHOICES and self.method != "optima":
            for name, own in CHOICES[self.method].items():
                value = getattr(self, name)
                if value not in (None, own):
                    raise UserError(
                        f"{flag(name)} {value} is for --method optima, not for --method "
                        f"{self.method}"
                    )

    def _check_cosine(self) -> None:
        """Refuse what gradients of single modules cannot be measured with, or not compared."""
        for name, value, why in (
            ("fsdp", True, "shards the gradients that it compares"),
            ("reward_cost", "flops", "divides cosines, of which the sign counts"),
            *(("hidden_loss", loss, "remembers every batch that it sees") for loss in QUEUED),
        ):
            if getattr(self, name) == value:
                told = str(value).lower()
                raise UserError(f"{COSINE}: {flag(name)} {told} {why}: leave one of them out")

    def _check_digits(self) -> None:
        """Refuse settings that the built-in data would ignore."""
        usual = {"augment": ("none", "off"), "tokenizer": ("words",), "image_size": ()}
        for name, own in usual.items():
            value = getattr(self, name)
            if value is not None and value not in own:
                raise UserError(
                    f"{flag(name)} {value} is for a data folder, not for the digits: leave it "
                    "out, or give --data FOLDER"
                )

    def _check_teacher_cache(self, augmented: bool) -> None:
        """Refuse to keep what the teacher does not say again, or does not say alone."""
        if augmented:
            raise UserError(
                f"--teacher-cache {self.teacher_cache} keeps what the teacher says of an image, "
                f"which is another one in every epoch with --augment {self.augment}: give "
                "--augment none, or leave --teacher-cache out"
            )
        if self.fsdp:
            raise UserError(
                f"--teacher-cache {self.teacher_cache} has each process run the teacher by "
                "itself, and --fsdp true has all run it together: leave one of them out"
            )

    def _check_numbers(self) -> None:
        for name in _POSITIVE + _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or value < 0 or (name in _POSITIVE and value == 0):
                kind = "positive" if name in _POSITIVE else "0 or more"
                raise UserError(f"{flag(name)} must be {kind} and finite, got {value}")
        if self.gamma is not None and not 0.0 < self.gamma <= 1.0:
            raise UserError(f"--gamma must be above 0 and at most 1, got {self.gamma}")
        for name in ("dropout", "cell_stage"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{flag(name)} must be in [0, 1), got {getattr(self, name)}")
        if self.hidden_scale != "none" and self.hidden_loss != "mse":
            raise UserError(
                f"--hidden-scale {self.hidden_scale} is for --hidden-loss mse, got "
                f"{self.hidden_loss}: leave one of them out"
            )
        if self.steps is not None and (self.warmup_steps or 0) >= self.steps:
            raise UserError(
                f"--warmup-steps {self.warmup_steps} must be below --steps {self.steps}"
            )

    def _check_weights(self) -> None:
        """Refuse weights that no student could have; how many layers it has is not known yet."""
        modules = dict.fromkeys(MODULES)
        cross = {"hidden_weight": False, "attention_weight": self.cross_attention}
        for name, crossed in cross.items():
            try:
                by_layer(flag(name), getattr(self, name), modules, cross=crossed)
            except ValueError as error:
                raise UserError(str(error)) from None
        if (self.attention_loss == maps.RELATIONS) != (self.relation_heads is not None):
            raise UserError(
                "--attention-loss relations and --relation-heads N go together, got "
                f"--attention-loss {self.attention_loss} and --relation-heads {self.relation_heads}"
            )
        headroom = self.method == "headroom" or self.reward == HEADROOM
        if self.rewarded and headroom and self.hidden_loss in (*UNPROJECTED, *QUEUED):
            raise UserError(
                "headroom is a share of variance, which --hidden-loss mse measures and "
                f"{self.hidden_loss} does not: take --method layerwise, or optima with --reward kl"
            )
        if self.cross_both_ways and not self.cross_attention:
            raise UserError("--cross-both-ways true needs --cross-attention true")

    def _check_rounds(self, layer_counts: Mapping[str, int]) -> None:
        """Refuse a bandit whose first pulls of each arm take more rounds than there are."""
        assert self.steps and self.round_steps
        policy = policies.make(self, arm_space(self.arms, layer_counts))
        rounds, first = self.steps // self.round_steps, policy.warm_up
        if rounds < first:
            times = first // policy.arms
            what = f"each of {policy.arms} arms {times} times" if times else f"{first} arms once"
            raise UserError(
                f"--policy {self.policy} pulls {what} first, {first} rounds of {self.round_steps} "
                f"steps, but --steps {self.steps} gives {rounds}: raise --steps, lower "
                "--round-steps or --init-rounds, or take another --policy or fewer --arms"
            )


# what the paper (and CoCa, where the paper refers to it) trains with, by task
_PAPER_TASKS: dict[str, dict[str, Any]] = {
    "vqa": {
        "batch_size": 64, "teacher_steps": 100_000, "teacher_lr": 2e-5, "teacher_head_lr": 5e-4,
        "augment": "1,10",
    },
    "snli_ve": {
        "batch_size": 128, "teacher_steps": 50_000, "teacher_lr": 5e-5, "teacher_head_lr": 1e-3,
        "augment": "1,10",
    },
    "nlvr2": {
        "batch_size": 64, "teacher_steps": 50_000, "teacher_lr": 2e-5, "teacher_head_lr": 5e-4,
    },
    "coco": {"batch_size": 128, "teacher_steps": 50_000, "teacher_lr": 1e-5},
}  # fmt: skip
_PAPER: dict[str, Any] = {
    "teacher": "coca_large",
    "student": "coca_tiny12",
    "steps": 100_000,
    "round_steps": 100,
    "init_rounds": 10,
    "lr": 1e-3,
    "warmup_steps": 1000,
    "augment": "none",
}
_PAPER_POLICY: dict[str, Any] = {"gamma": 0.98, "variance_scale": 1.0}
# where neither says: a choice of this project
_OWN: dict[str, Any] = {"reward_examples": 256}

# the built-in data: minutes on two CPU cores
_DIGITS: dict[str, Any] = {
    "teacher": "digits_teacher",
    "student": "digits_student",
    "steps": 1000,
    "round_steps": 10,
    "init_rounds": 2,
    "lr": 3e-3,
    "warmup_steps": 50,
    "train_images": 20_000,
    "batch_size": 32,
    "reward_examples": 256,
    "teacher_steps": 1200,
    "teacher_lr": 2e-3,
    "augment": "none",
}
_DIGITS_TASKS: dict[str, dict[str, Any]] = {
    "vqa": {},
    "snli_ve": {"teacher_steps": 1000},
    # the reward on 256 would take 6 % of the training time, see bench/README.md
    "nlvr2": {"teacher_steps": 1000, "batch_size": 24, "reward_examples": 192},
    "coco": {"teacher_steps": 700, "batch_size": 24},
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill every ``None`` that stands for a default of the task, data or method."""
    if config.data == "digits":
        defaults = _DIGITS | _DIGITS_TASKS[config.task]
    else:
        defaults = paper_scale(config.task) | _OWN
    steps = config.steps or defaults["steps"]
    # a short run of a few steps keeps its shape: a twentieth of warm-up, not more steps than it has
    defaults["warmup_steps"] = min(defaults["warmup_steps"], steps // 20)
    defaults.setdefault("teacher_head_lr", config.teacher_lr or defaults["teacher_lr"])
    defaults["teacher_batch_size"] = config.batch_size or defaults["batch_size"]
    defaults["head_lr"] = config.lr or defaults["lr"]
    defaults["kl_weight"] = 1.0 if config.method == "kd" else 0.0
    defaults |= CHOICES.get(config.method, CHOICES["headroom"])
    if (config.policy or defaults["policy"]) == GaussianThompson.name:
        defaults |= _PAPER_POLICY
    else:
        del defaults["init_rounds"]  # left to the policy
    reward = config.reward or defaults["reward"]
    defaults["reward_cost"] = "flops" if reward == HEADROOM else "none"
    defaults["log_every"] = max(1, steps // 100)
    defaults["eval_every"] = max(1, steps // 4)
    defaults["checkpoint_every"] = max(1, steps // 10)
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **missing)
    if config.student in presets.PRESETS:
        config.check_arms(presets.PRESETS[config.student].layer_counts)
    return config


def paper_scale(task: str) -> dict[str, Any]:
    """What the paper trains with on a task, as far as it says (else CoCa, to which it refers)."""
    return _PAPER | _PAPER_TASKS[task]


def unusual(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The policy and the reward that are told, where they are not the method's own."""
    usual = CHOICES.get(method, {})
    told = {name: settings.get(name) for name in ("policy", "reward")}
    return {name: value for name, value in told.items() if value not in (None, usual.get(name))}


def flag(name: str) -> str:
    """``round_steps`` as ``--round-steps``."""
    return "--" + name.replace("_", "-")


def default_text(field: dataclasses.Field[Any]) -> str:
    """What ``--help`` says of a setting's default."""
    if field.default is not None:
        usual = str(field.default)
        return f" (default {usual.lower() if field.type == 'bool' else usual})"
    if field.name in _PAPER_POLICY:
        return f" (default {_PAPER_POLICY[field.name]} for thompson, else the policy's own)"
    if field.name in _DIGITS:
        digits, paper = _DIGITS[field.name], (_PAPER | _OWN).get(field.name, "by task")
        if digits == paper or field.metadata["help"].startswith("digits:"):
            return f" (default {digits})"
        return f" (default {digits} on digits, else {paper})"
    return ""
