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
        "optima, the choice of the paper's bandit; gradient-cosine, those whose gradient agrees "
        "with the task's on a batch; layerwise, all; balanced, all, each module's loss and the "
        "task's divided by its running mean; random; fixed, those of --arm; kd and finetune, none",
        METHODS,
    )
    arm: str | None = _field(None, "for --method fixed, such as image+text or image[1-3]")
    recipe: str | None = _field(
        None,
        "the losses of another system, layerwise unless --method is given; other settings beside "
        "it override it; optima_fast.doctor describes each",
        tuple(RECIPES),
    )
    arms: str = _field(
        "modules",
        "subsets of modules, one module, or subsets of groups of their layers",
        ARM_SPACES,
    )
    policy: str | None = _field(
        None, f"bandit of --method optima: {', '.join(policies.choices())}; default thompson"
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
        "divide the reward by the arm's cost; default flops for headroom, else none",
        ("none", "flops"),
    )
    reward_split: str = _field(
        "train", "where its examples are from: held-out ones are not trained on", REWARD_SPLITS
    )

    teacher: str | None = _field(
        None, "a preset or checkpoint (hf-hub:ORG/NAME, trained on the task first), or a run folder"
    )
    student: str | None = _field(None, "a preset, or a checkpoint or run folder to go on with")
    stages: str | None = _field(
        None, "students, one after the other, each the next one's teacher: coca_tiny12,coca_tiny6"
    )
    student_init: str | None = _field(None, "teacher, random, a checkpoint or a run folder")
    tokenizer: str | None = _field(
        None,
        "clip, sentencepiece, words or a FILE.model; default the teacher's or checkpoint's "
        "own, else sentencepiece; the digits have words",
    )
    image_size: int | None = _field(None, "side of an image in pixels; default the teacher's")
    dropout: float = _field(0.0, "dropout before the task's classifier")

    steps: int | None = _field(None, "optimizer steps in all")
    round_steps: int | None = _field(None, "P, steps per round of the bandit")
    init_rounds: int | None = _field(None, "T0, rounds per arm before the bandit chooses")
    gamma: float | None = _field(None, "what a round keeps of the bandit's memory")
    variance_scale: float | None = _field(None, "factor on the bandit's sampling variance")
    reward_examples: int | None = _field(None, "training examples the reward is measured on")
    reward_memory: float = _field(
        2.0,
        "GiB of the device for what the teacher says of them; where it is not enough, the teacher "
        "runs again in every round",
    )

    train_images: int | None = _field(None, "digits: training canvases; a tenth more to test on")
    extra_images: str | None = _field(
        None,
        "coco: a folder of images without captions, which the teacher captions once, greedily, "
        "to train on too",
    )
    augment: str | None = _field(
        None,
        "RandAugment of training images: none (or off), or LAYERS,MAGNITUDE; default 1,10 for "
        "folders of vqa and snli_ve, else none",
    )
    image_errors: str = _field(
        "fail", "at an image that cannot be read: fail, or skip what shows it", ("fail", "skip")
    )
    batch_size: int | None = _field(None, "images (nlvr2: sentences) per step")
    lr: float | None = _field(None, "peak learning rate")
    head_lr: float | None = _field(None, "peak learning rate of the task head; default --lr")
    warmup_steps: int | None = _field(None, "steps of linear warm-up")
    weight_decay: float = _field(0.1, "decoupled weight decay")
    clip: float = _field(1.0, "largest gradient norm")
    hidden_weight: float | Mapping[str, Any] = _field(
        1.0,
        "a2, weight of the hidden-state losses; or by module, as YAML: {image: 0.1, text: [0, 1], "
        "multimodal: {last: 1}} is of all layers, of each, of the last alone",
    )
    attention_weight: float | Mapping[str, Any] = _field(
        1e-2, "a3, of the attention losses, likewise; cross: that of --cross-attention"
    )
    prediction_weight: float = _field(1.0, "weight of the task's own loss")
    soft_labels: str = _field(
        "kl",
        "what the KL term is: kl, or for vqa bce with the teacher's probabilities",
        SOFT_LABELS,
    )
    kl_weight: float | None = _field(None, "a1, weight of the KL term; default 1 for kd, else 0")
    attention_loss: str = _field(
        "scores",
        "of attention maps: of the mean over heads, of each, or of each where both models have as "
        "many (auto); relations: among queries and among keys",
        maps.NAMES,
    )
    attention_scale: str = _field(
        "none", "multiply attention losses by their number of keys", maps.SCALES
    )
    relation_heads: int | None = _field(None, "of --attention-loss relations")
    hidden_loss: str = _field("mse", "of hidden states", tuple(HIDDEN_LOSSES))
    negatives: int = _field(4096, "teacher tokens of earlier steps, of --hidden-loss contrastive")
    hidden_temperature: float = _field(0.07, "of --hidden-loss contrastive")
    hidden_scale: str = _field(
        "none", "divide hidden losses by the teacher's", ("none", "variance")
    )
    reduction: str = _field("sum", "over the layers of a loss", ("sum", "mean"))
    layer_mapping: str = _field(
        "even",
        "the teacher layer of each student layer: spread evenly, the last of the last; the same "
        "reversed; or random, drawn by --seed",
        matching.MAPPINGS,
    )
    cross_attention: bool = _field(False, "match the decoder's cross-attention too")
    cross_both_ways: bool = _field(False, "and what its image tokens see of the text")

    teacher_steps: int | None = _field(
        None, "optimizer steps of the teacher's own training; 0: a checkpoint captions as it is"
    )
    teacher_lr: float | None = _field(None, "its peak learning rate")
    teacher_head_lr: float | None = _field(None, "and of its task head; default --teacher-lr")
    teacher_batch_size: int | None = _field(None, "its images per step")
    cell_stage: float = _field(0.0, "digits: share of steps that also name the digit in each cell")

    seed: int = _field(0, "student's start, order of the batches, bandit")
    teacher_seed: int = _field(0, "the same for the teacher's own training")
    data_seed: int = _field(0, "what the built-in data is drawn from")
    device: str = _field("auto", "auto, cpu, cuda or cuda:N")
    compile: str = _field("auto", "torch.compile: auto is on for CUDA only", ("auto", "on", "off"))
    precision: str = _field("auto", "auto is bf16 on CUDA, else fp32", ("auto", "fp32", "bf16"))
    threads: int = _field(0, "CPU threads; 0 is one per core that this process may use")
    workers: str = _field(
        "auto",
        "processes that read images; auto is none for digits, else the usable cores but one",
    )
    accumulate: int = _field(1, "parts that a process works on one after the other, to save memory")
    recompute: bool = _field(
        False, "activation checkpointing: compute a student's layers again in the backward pass"
    )
    fsdp: bool = _field(False, "with torchrun: shard student and teacher over the processes")
    keep: str = _field(
        "last", "the student that is kept: last, or best on the validation split", ("last", "best")
    )
    max_hours: float | None = _field(
        None, "stop, saved, so many hours after the command began; it goes on later"
    )
    track: str = _field(
        "none",
        "send the lines of metrics.jsonl to a service too",
        ("none", "tensorboard", "wandb"),
    )
    log_every: int | None = _field(None, "steps between lines of metrics.jsonl")
    eval_every: int | None = _field(None, "steps between measurements on the validation split")
    checkpoint_every: int | None = _field(None, "steps between checkpoints")
    out: str | None = _field(None, "run folder; default runs/TASK-METHOD-seedSEED")
    cache: str | None = _field(
        None, "where trained teachers are kept; default ~/.cache/optima_fast"
    )
    teacher_cache: str | None = _field(
        None,
        "a folder that keeps what the teacher says of each training sample, for later epochs and "
        "runs; with --augment none",
    )
    teacher_cache_dtype: str = _field(
        "bf16", "what it is rounded to; fp32 is not rounded, bf16 is half the size", CACHE_DTYPES
    )
    teacher_cache_gb: float = _field(50.0, "how much that folder may hold")
    resume: str = _field("auto", "auto, never, or the run folder to go on with")

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
        return f" (default {field.default})"
    if field.name in _PAPER_POLICY:
        return f" (default {_PAPER_POLICY[field.name]} for thompson, else the policy's own)"
    if field.name in _DIGITS:
        paper = (_PAPER | _OWN).get(field.name, "by task")
        return f" (default {_DIGITS[field.name]} on digits, else {paper})"
    return ""
