"""What this machine can do: device, dtype, offloading and backend, checked before anything is loaded."""

from __future__ import annotations

from typing import Any

from .errors import WrongUsageError, as_wrong_usage

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


def devices() -> list[dict[str, Any]]:
    """The processor, and each GPU that torch can use."""
    import torch

    from .run_record import device_name

    found: list[dict[str, Any]] = [{"device": "cpu", "name": device_name("cpu")}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        values = {"memory_gib": facts.total_memory / 2**30, "compute_capability": f"{facts.major}.{facts.minor}"}
        found.append({"device": f"cuda:{index}", "name": facts.name, **values})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def pick_device(name: str | None) -> str:
    """The device asked for, checked to be there; None picks CUDA where there is one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WrongUsageError(f"--device takes cpu, cuda, cuda:N or mps, but is {name!r}.") from error
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if device.type not in counts:
        raise WrongUsageError(f"--device takes cpu, cuda, cuda:N or mps, but is {name!r}.")
    count = counts[device.type]
    if (device.index or 0) >= count:
        there = f"there are {count}" if count else "there is none"
        raise WrongUsageError(f"--device {name}: {there} on this machine. Use --device cpu, or leave it out.")
    return name


def pick_dtype(name: str | None, device: str) -> str:
    """The dtype asked for, tried out on the device; None picks bfloat16 on a GPU and float32 on the CPU."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if name is None:
        return "bfloat16" if fast else ("float16" if on_gpu else "float32")
    if name not in DTYPES:
        raise WrongUsageError(f"--dtype takes float32, float16 or bfloat16, but is {name!r}.")
    name = DTYPES[name]
    if on_gpu and name == "bfloat16" and not fast:
        raise WrongUsageError("--dtype bfloat16 needs a newer GPU than this one; use --dtype float16.")
    try:
        _try_dtype(getattr(torch, name), device)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise WrongUsageError(f"--dtype {name} does not work on {device} here; use --dtype float32.") from error
    return name


def _try_dtype(dtype, device: str) -> None:
    """The operations that a video transformer needs, once, on next to nothing."""
    import torch
    import torch.nn.functional as F

    video = torch.ones(1, 4, 3, 4, 4, dtype=dtype, device=device)
    tokens = F.conv3d(video, torch.ones(8, 4, 1, 2, 2, dtype=dtype, device=device), stride=(1, 2, 2))
    tokens = F.layer_norm(tokens.flatten(2).mT, (8,))
    tokens = F.linear(tokens, torch.ones(8, 8, dtype=dtype, device=device))[:, None]
    F.scaled_dot_product_attention(tokens, tokens, tokens)


def check_offload(offload: str, device: str) -> None:
    """Refuse offloading where there is no GPU to offload from."""
    import torch

    if offload != "none" and torch.device(device).type == "cpu":
        raise WrongUsageError(f"--offload {offload} moves parts between a GPU and the CPU; on the CPU leave it out.")


def check_backend(backend: str, device: str) -> None:
    """Refuse a backend that cannot run on the device, before anything is loaded."""
    import torch

    from ..backends import choose_backend

    with as_wrong_usage(ValueError, RuntimeError, ImportError):
        choose_backend(backend, torch.empty(1, 1, 1, 64, device=device))
