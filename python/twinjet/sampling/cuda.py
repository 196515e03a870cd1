"""The sampler on CUDA devices: the same tokens as on the CPU, drawn where the logits are.

`twinjet.sampling.Sampler.sample` comes here by itself when its logits are on a CUDA device. Engines that
do not want to wait for the device each step use CudaSampler: `prepare` copies parameters without waiting,
`launch` only starts kernels and may be captured in a CUDA graph. Tensors come and go through DLPack, so
this module needs neither torch nor cupy; only `allocate` asks the library that the logits belong to for
memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from twinjet import _core

if TYPE_CHECKING:
    from twinjet._core import SamplerRequest

__all__ = ["CudaOutputs", "CudaSampler", "device_of", "has_cuda"]

_DLPACK_CUDA = 2


def has_cuda() -> bool:
    """Say whether this build has the CUDA side. Says nothing about devices."""
    return bool(_core.HAS_CUDA)


def device_of(array: Any) -> int | None:
    """Return the CUDA device an array lives on, None for one on the CPU or without DLPack."""
    ask = getattr(array, "__dlpack_device__", None)
    if ask is None:
        return None
    kind, index = ask()
    return int(index) if int(kind) == _DLPACK_CUDA else None


@dataclass(frozen=True, slots=True)
class CudaOutputs:
    """Device tensors that a launch fills; made by `CudaSampler.allocate` or by hand.

    Attributes:
        token_ids: int32 [rows]; -1 where no token was admissible.
        status: int32 [rows]; the bits of `twinjet.sampling.SampleResult.status`.
        top_ids: int32 [rows, 1 + n] or None; see `twinjet.sampling.Logprobs`, as the next two.
        top_logprobs: float32 [rows, 1 + n] or None.
        ranks: int32 [rows] or None.
        packed: int32 buffer that all of them lie in, or None; see `unpack`.
    """

    token_ids: Any
    status: Any
    top_ids: Any | None = None
    top_logprobs: Any | None = None
    ranks: Any | None = None
    packed: Any | None = None


class CudaSampler:
    """Draws one token per row of logits on one CUDA device.

    One caller at a time. Memory grows to the largest batch seen, then stays.

    Args:
        device: CUDA ordinal.
        num_slots: batches that `prepare` may be ahead of the device.

    Raises:
        RuntimeError: this build has no CUDA side, or the device cannot be used.
    """

    def __init__(self, device: int = 0, num_slots: int = 4) -> None:
        if not has_cuda():
            raise RuntimeError(
                "logits are on a CUDA device, but this build of twinjet has no CUDA side: "
                "build with TWINJET_CUDA=ON, or pass logits on the CPU"
            )
        self._core = _core.CudaSampler(device, num_slots)
        self.device = device

    def reserve(self, num_rows: int, vocab_size: int, num_edits: int = 0, num_allowed_rows: int = 0) -> None:
        """Allocate for batches up to this size now, so that later calls do not.

        Args:
            num_rows: rows of a batch.
            vocab_size: columns.
            num_edits: tokens with a bias, a penalty or a mask, over all rows of a batch.
            num_allowed_rows: rows with allowed_token_ids.
        """
        self._core.reserve(num_rows, vocab_size, num_edits, num_allowed_rows)

    def prepare(
        self,
        requests: Sequence[SamplerRequest],
        vocab_size: int,
        *,
        bitmask_rows: npt.NDArray[np.int32] | None = None,
        stream: int = 0,
    ) -> None:
        """Copy the requests' parameters for the next token to the device, on a stream.

        Waits for nothing, unless num_slots batches are on their way or memory has to grow. A request with
        penalties or bad words must know its output tokens by now (`append`); others need only the right
        position.

        Args:
            requests: one per row, in row order; none twice.
            vocab_size: columns of the logits.
            bitmask_rows: row of the bitmask for each row, -1 for none; None means no bitmask.
            stream: handle of the stream (`torch.cuda.Stream.cuda_stream`); 0 is the legacy default stream.

        Raises:
            ValueError: a request given twice or with another vocab_size.
            RuntimeError: a CUDA call failed.
        """
        self._core.prepare(requests, vocab_size, bitmask_rows, stream)

    def launch(
        self,
        logits: Any,
        outputs: CudaOutputs,
        *,
        bitmask: Any | None = None,
        processed_logits: Any | None = None,
        processed_logprobs: bool = False,
        dtype: str = "",
        stream: int = 0,
    ) -> None:
        """Start the kernels that draw the prepared rows. No wait, no allocation, capturable.

        A captured launch reads what `prepare` last wrote when it is replayed; the batch must have the same
        size, the same number of edited tokens and the same tensors then.

        Args:
            logits: [rows, vocab_size] or [vocab_size], float32, float16 or bfloat16; not changed.
            outputs: where results go; logprobs are worked out if `top_ids` is there (at most 128 a row).
            bitmask: int32 [n, at least ceil(vocab_size / 32)] on the device.
            processed_logits: float32 [rows, vocab_size], receives the logits after masks, bias and penalties.
            processed_logprobs: logprobs of the distribution drawn from, not of the logits as given.
            dtype: "bfloat16" reads int16 as bfloat16.
            stream: see `prepare`.

        Raises:
            TypeError: a wrong dtype or an object without DLPack.
            ValueError: a wrong shape, stride or device.
            RuntimeError: a CUDA call failed.
        """
        num_logprobs = -1 if outputs.top_ids is None else int(outputs.top_ids.shape[-1]) - 1
        self._core.launch(
            logits,
            dtype,
            bitmask,
            outputs.token_ids,
            outputs.status,
            processed_logits,
            num_logprobs,
            processed_logprobs,
            outputs.top_ids,
            outputs.top_logprobs,
            outputs.ranks,
            stream,
        )

    @staticmethod
    def allocate(logits: Any, num_logprobs: int | None = None) -> CudaOutputs:
        """Make outputs for these logits with the library the logits belong to (torch or cupy).

        They lie in one buffer, so that one copy brings them to the host.
        """
        rows = int(logits.shape[0]) if len(logits.shape) == 2 else 1
        library = _library_of(logits)
        where = {"device": logits.device} if library.__name__ == "torch" else {}
        packed = library.empty((_num_packed(rows, num_logprobs),), dtype=library.int32, **where)
        tokens, status, ids, logprobs, ranks = _split(packed, rows, num_logprobs, library.float32)
        return CudaOutputs(tokens, status, ids, logprobs, ranks, packed)


def _num_packed(rows: int, num_logprobs: int | None) -> int:
    return rows * (2 if num_logprobs is None else 3 + 2 * (1 + num_logprobs))


def _split(packed: Any, rows: int, num_logprobs: int | None, float32: Any) -> tuple[Any, ...]:
    """Give the views of a packed buffer in the order of CudaOutputs; numpy, torch or cupy."""
    tokens, status = packed[:rows], packed[rows : 2 * rows]
    if num_logprobs is None:
        return tokens, status, None, None, None
    shape = (rows, 1 + num_logprobs)
    middle = 3 * rows + shape[0] * shape[1]
    ids, logprobs = packed[3 * rows : middle], packed[middle:].view(float32)
    return tokens, status, ids.reshape(shape), logprobs.reshape(shape), packed[2 * rows : 3 * rows]


def unpack(
    values: npt.NDArray[np.int32], rows: int, num_logprobs: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32], tuple[npt.NDArray[Any], ...] | None]:
    """Take a packed buffer's copy on the host apart: tokens, statuses, and (ids, logprobs, ranks) or None."""
    tokens, status, *tops = _split(values, rows, num_logprobs, np.float32)
    return tokens, status.view(np.uint32), None if num_logprobs is None else tuple(tops)


def _library_of(array: Any) -> Any:
    names = {cls.__module__.split(".")[0] for cls in type(array).__mro__} & {"torch", "cupy"}
    if not names:
        raise TypeError(
            f"logits on a CUDA device are a {type(array).__name__}: must be a torch or cupy array here; "
            "use twinjet.sampling.cuda.CudaSampler with outputs of your own for others"
        )
    return sys.modules[names.pop()]


def current_stream(array: Any) -> int:
    """Return the handle of the stream on which the array's library works now."""
    library = _library_of(array)
    if library.__name__ == "torch":
        return int(library.cuda.current_stream(array.device).cuda_stream)
    return int(library.cuda.get_current_stream().ptr)


def to_host(array: Any) -> npt.NDArray[Any]:
    """Copy a device array to numpy. Waits for the device."""
    host = array.cpu().numpy() if _library_of(array).__name__ == "torch" else array.get()
    return np.asarray(host)


def sample(
    samplers: dict[int, CudaSampler],
    logits: Any,
    requests: Sequence[SamplerRequest],
    *,
    bitmask: Any | None,
    bitmask_rows: npt.NDArray[np.int32] | None,
    advance: bool | npt.NDArray[np.bool_],
    num_logprobs: int | None,
    processed_logprobs: bool,
    processed_logits: Any | None,
    dtype: str,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32], tuple[npt.NDArray[Any], ...] | None]:
    """Draw on the logits' device and stream, wait, and advance the requests: Sampler.sample's CUDA half.

    Raises:
        TypeError, ValueError: as Sampler.sample.
        RuntimeError: no CUDA side in this build, or a CUDA call failed.
    """
    device = device_of(logits)
    if device is None:
        raise ValueError("logits are not on a CUDA device")
    if device not in samplers:
        samplers[device] = CudaSampler(device)
    sampler = samplers[device]
    rows = int(logits.shape[0]) if len(logits.shape) == 2 else 1
    if len(requests) != rows:
        raise ValueError(f"requests has length {len(requests)}: must be one per row of {rows}")
    flags = np.asarray(advance)
    if flags.dtype != np.bool_ or flags.shape not in ((), (rows,)):
        raise ValueError("advance must be a bool or have one bool per row of logits")
    if bitmask is None and bitmask_rows is not None:
        raise ValueError("bitmask_rows is given without a bitmask")
    if bitmask is not None:
        if device_of(bitmask) is None:
            library = _library_of(logits)
            host = np.ascontiguousarray(bitmask)
            bitmask = (
                library.asarray(host)
                if library.__name__ == "cupy"
                else library.as_tensor(host, device=logits.device)
            )
        if bitmask_rows is None:
            if int(bitmask.shape[0]) < rows:
                raise ValueError(f"bitmask has {int(bitmask.shape[0])} rows: must have one per row of logits")
            bitmask_rows = np.arange(rows, dtype=np.int32)
    stream = current_stream(logits)
    outputs = CudaSampler.allocate(logits, num_logprobs)
    sampler.prepare(requests, int(logits.shape[-1]), bitmask_rows=bitmask_rows, stream=stream)
    sampler.launch(
        logits,
        outputs,
        bitmask=bitmask,
        processed_logits=processed_logits,
        processed_logprobs=processed_logprobs,
        dtype=dtype,
        stream=stream,
    )
    tokens, status, tops = unpack(to_host(outputs.packed), rows, num_logprobs)
    for request, token, wanted in zip(
        requests, tokens.tolist(), np.broadcast_to(flags, (rows,)), strict=True
    ):
        if wanted and token >= 0:
            request.append(token)
    return tokens, status, tops
