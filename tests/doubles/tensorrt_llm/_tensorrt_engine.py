"""Stand-in for the LLM of prebuilt TensorRT engines; its logits hook is not recorded, so it must not be used."""

from __future__ import annotations

from typing import Any

from tensorrt_llm import _contract, _core


class LLM(_core.LLM):
    """Runs the toy model for a folder with a built engine."""

    is_prebuilt = True

    def generate_async(self, *args: Any, **kwargs: Any) -> Any:
        params = kwargs.get("sampling_params")
        assert params is None or params.logits_processor is None, "not recorded for prebuilt engines"
        return super().generate_async(*args, **kwargs)

    generate_async.__signature__ = _core.LLM.generate_async.__signature__  # type: ignore[attr-defined]

    def _abort(self, request: Any) -> None:
        if request in self._active and request.params.logprobs and _contract.has("prebuilt_dies_of_logprobs"):
            self.crash(RuntimeError("aborted with logprobs"))
            return
        super()._abort(request)
