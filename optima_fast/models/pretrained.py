"""Pretrained CoCa by name: a file, a folder or a Hugging Face id, in open_clip's formats."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models import open_clip
from optima_fast.models.config import CoCaConfig
from optima_fast.models.model import CoCa

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# CLIP's normalisation, which open_clip takes where a config names none
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_HUB = "hf-hub:"
_CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Checkpoint:
    """An open_clip CoCa on disk, known to fit together; see :func:`find`.

    Attributes:
        name: As the user typed it.
        path: The weights file.
        config: Sizes and form.
        mean: Of each channel, for normalising images in 0..1.
        std: Likewise.
        tokenizer: ``"clip"`` for a vocabulary of CLIP's size, else ``""`` for unknown.
    """

    name: str
    path: Path
    config: CoCaConfig
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    tokenizer: str = ""

    def load(self) -> CoCa:
        """The model in float32 on the CPU.

        Weights are copied one by one out of the file's mapping, so that beyond the model itself
        only pages that the system can drop are held.

        Raises:
            UserError: The file changed since it was found, or a weight is NaN or infinite.
        """
        with torch.device("meta"):
            model = CoCa(self.config)
        # open_clip's form has no buffers, whose values this would lose
        model.to_empty(device="cpu")
        state = open_clip.from_open_clip(_read(self.path, "cpu"), self.config)
        model.load_state_dict(state, strict=True)
        for name, value in model.state_dict().items():
            # aminmax hands NaN on and needs no memory of the tensor's size
            if not all(bool(end.isfinite()) for end in torch.aminmax(value)):
                raise UserError(
                    f"{self.path} has values that are NaN or infinite, the first in {name}: take "
                    "another checkpoint"
                )
        return model


def find(name: str) -> Checkpoint | None:
    """The checkpoint that ``name`` stands for.

    Names and shapes are read and checked, weights are not. Files on the hub are downloaded, unless
    its cache has them.

    Args:
        name: ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``; a folder as open_clip and the
            hub lay it out; or a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file of a state
            dict, or of a training checkpoint with a ``"state_dict"``. A file or folder's
            ``open_clip_config.json`` is used where there is one, else the shapes tell.

    Returns:
        ``None`` if it is neither, such as a preset's name or a run folder.

    Raises:
        UserError: There is no such file or id, no network, or what is there is no CoCa of
            open_clip.
    """
    if name.startswith(_HUB):
        config_path, path = _from_hub(name)
    else:
        path = Path(name).expanduser()
        if path.is_dir():
            found = next((path / file for file in WEIGHT_FILES if (path / file).is_file()), None)
            if found is None and not (path / CONFIG_FILE).is_file():
                return None
            if found is None:
                raise UserError(f"{path} has {CONFIG_FILE} but none of {', '.join(WEIGHT_FILES)}")
            path = found
        elif path.suffix not in SUFFIXES or _is_of_a_run(path):
            return None
        config_path = path.with_name(CONFIG_FILE)
    described = _read_json(config_path) if config_path and config_path.is_file() else {}
    state = _read(path, "meta")
    try:
        config = open_clip.config_of(described.get("model_cfg"), state)
        open_clip.from_open_clip(state, config)
        mean, std = _normalisation(described.get("preprocess_cfg", {}))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tokenizer = "clip" if config.vocab_size == _CLIP_VOCABULARY else ""
    return Checkpoint(name, path, config, mean, std, tokenizer)


def _is_of_a_run(path: Path) -> bool:
    return path.name == "student.safetensors" and path.with_name("model.json").is_file()


def _normalisation(options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Mean and standard deviation of a ``preprocess_cfg``; one number is that of all channels."""
    for key, usual in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if (options.get(key) or usual) != usual:
            raise UserError(
                f"{CONFIG_FILE} asks for {key} {options[key]!r}; only {usual!r} is supported"
            )
    values = []
    for key, standard in (("mean", MEAN), ("std", STD)):
        value = options.get(key) or standard
        channels: Sequence[Any] = value if isinstance(value, list | tuple) else [value] * 3
        numbers = all(isinstance(x, int | float) for x in channels)
        if len(channels) != 3 or not numbers or (key == "std" and min(channels) <= 0):
            kind = "positive numbers" if key == "std" else "numbers"
            raise UserError(f"{CONFIG_FILE}: {key} must be 3 {kind}, got {value!r}")
        values.append(tuple(channels))
    return values[0], values[1]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if isinstance(value, dict) and "model_cfg" not in value:
        value = {"model_cfg": value}
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key, {}), dict) for key in ("model_cfg", "preprocess_cfg")
    ):
        raise UserError(f"{path} must hold model_cfg and preprocess_cfg, as open_clip's do")
    return value


def _read(path: Path, device: str) -> dict[str, Tensor]:
    """The state dict in ``path``, mapped rather than read; names and shapes for ``"meta"``."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, device)
        value = _read_pickle(path, device)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UserError(_damaged(path, "not what torch.save writes")) from error
        raise UserError(
            f"{path} holds {code[1]} besides tensors and plain values, and reading that could run "
            "code from it; if you trust it, save its weights alone: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program, as OpenAI's CLIP comes, not a file of weights: "
                "give open_clip's weights of a CoCa"
            ) from error
        raise UserError(_damaged(path, error)) from error
    except Exception as error:
        # a reader of bytes that are no pickle stumbles in any way
        raise UserError(_damaged(path, "not what torch.save writes")) from error
    state = value.get("state_dict", value) if isinstance(value, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        held = sorted(map(str, value))[:3] if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{path} is no state dict, nor does it have one (it holds {held})")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _damaged(path: Path, error: object) -> str:
    reason = (str(error).splitlines() or ["it ends too early"])[0][:160]
    return f"{path} is damaged or no checkpoint ({reason}): copy or download it again"


def _read_safetensors(path: Path, device: str) -> dict[str, Tensor]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if device == "meta":
                shapes = {name: file.get_slice(name).get_shape() for name in names}
                state = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
            else:
                state = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(_damaged(path, error)) from error
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _read_pickle(path: Path, device: str) -> Any:
    # files from before torch 1.6 are no archives, which alone can be mapped
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    with warnings.catch_warnings():
        # of what the error that follows says better
        warnings.simplefilter("ignore")
        return torch.load(path, map_location=device, weights_only=True, mmap=archive)


def _from_hub(name: str) -> tuple[Path | None, Path]:
    """Local paths of a hub repository's configuration, if it has one, and weights.

    Raises:
        UserError: No such repository or revision, no checkpoint in it, no way to reach it.
    """
    from huggingface_hub import errors, hf_hub_download

    repository, _, revision = name.removeprefix(_HUB).partition("@")
    unreachable: Exception | None = None

    def fetch(file: str) -> Path | None:
        nonlocal unreachable
        try:
            return Path(
                hf_hub_download(
                    repository,
                    file,
                    revision=revision or None,
                    # once it could not be reached, only the cache is looked at
                    local_files_only=unreachable is not None,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except errors.EntryNotFoundError:
            pass
        return None

    try:
        config_path = fetch(CONFIG_FILE)
        path = next(filter(None, map(fetch, WEIGHT_FILES)), None)
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"{name}: the Hugging Face hub has no such model, or you have no access (then run "
            "'hf auth login'); it must be hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: {repository} has no revision {revision!r}") from error
    except Exception as error:
        # a full disk, a lost connection: the client's errors share no class between its versions
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{name}: cannot download it ({reason})") from error
    if path is None and unreachable is not None:
        raise UserError(
            f"{name}: the hub cannot be reached and its cache here does not have the checkpoint; "
            "connect, set HF_ENDPOINT to a mirror, or give a folder with the files instead"
        ) from unreachable
    if path is None:
        raise UserError(f"{name} is no open_clip checkpoint: none of {', '.join(WEIGHT_FILES)}")
    return config_path, path
