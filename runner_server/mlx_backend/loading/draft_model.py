"""Loading of draft models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from runner_common.contract import MAX_DRAFT
from runner_common.model_directory import Located, ModelDirectory
from runner_server.engine.types import DraftInfo, LoadSpec
from runner_server.errors import InvalidField, ModelUnsupported
from runner_server.host.model_root import ModelRoot
from runner_server.mlx_backend.cache.row_caches import CachePieces
from runner_server.mlx_backend.loading.building import Built, build, read_directory
from runner_server.mlx_backend.loading.finding import find_model
from runner_server.mlx_backend.loading.reading import read_files
from runner_server.mlx_backend.planning.measure import measure, weight_bytes
from runner_server.mlx_backend.planning.plan import Plan, make_plan
from runner_server.mlx_backend.speculation.proposer import DraftModel, Proposer
from runner_server.mlx_backend.stream_errors import recover
from runner_server.mlx_backend.tokenizer.codec import FastCodec, load_codec

logger = logging.getLogger(__name__)

_SHOWN_CHARS = 40


@dataclass(frozen=True)
class DraftFiles:
    """The files of a draft model.

    Attributes:
        located: Where they are.
        directory: Their contents, without the weights.
    """

    located: Located
    directory: ModelDirectory

    @classmethod
    def find(cls, spec: LoadSpec, root: ModelRoot | None) -> DraftFiles | None:
        """Find and read the files of a load's draft model; None if it has none.

        Raises:
            ModelNotFound: The draft model does not exist.
            ModelUnsupported: The files cannot be used, or only to embed.
        """
        return cls.at(find_model(spec.draft_model, root)) if spec.draft_model else None

    @classmethod
    def at(cls, located: Located) -> DraftFiles:
        """Read the files of a draft model, with the errors of :meth:`find`."""
        directory = read_directory(located)
        if not directory.configuration.has_output_layer:
            raise _unfit(located, "it has no output layer")
        return cls(located, directory)

    def require_tokens_of(self, target: FastCodec) -> None:
        """Compare the tokens with those of the target.

        Raises:
            ModelUnsupported: They differ; the message says where.
        """
        own, _ = load_codec(self.directory.path, self.directory.configuration.values)
        if difference := _difference(target.vocabulary(), own.vocabulary()):
            raise _unfit(self.located, f"it has other tokens than the model: {difference}")


@dataclass(frozen=True)
class PlannedDraft:
    """A draft model with unread weights.

    Attributes:
        files: Its files.
        built: The model.
        plan: The memory for one text at a time.
    """

    files: DraftFiles
    built: Built
    plan: Plan

    @classmethod
    def of(cls, files: DraftFiles, target: Built) -> PlannedDraft:
        """Build and plan the draft model of a target, in the same dtype.

        Raises:
            InvalidField: The target's caches cannot be cut back, so it checks no drafts.
            ModelUnsupported: Those of the draft model cannot, or mlx_lm cannot build it.
        """
        if kinds := CachePieces.of(target.model).uncuttable:
            text = f"the caches of this model ({kinds}) cannot be cut back, so it checks no drafts"
            raise InvalidField([("draft_model", text)])
        longest = files.directory.configuration.context_length
        spec = LoadSpec(
            str(files.located.path),
            context_length=min(target.context_length, longest),
            parallel=1,
            dtype=target.spec.dtype,
            prefix_cache_bytes=0,
            # Its answers are guesses in any case.
            allow_inexact=True,
        )
        built = build(files.directory, spec, None)
        if kinds := CachePieces.of(built.model).uncuttable:
            raise _unfit(files.located, f"its caches ({kinds}) cannot be cut back")
        sizes = measure(built.model, files.directory, built.context_length, 1)
        return cls(files, built, make_plan(spec, sizes, longest))

    def rebuilt(self) -> PlannedDraft:
        """Return the draft model built anew, as planning leaves unread arrays behind."""
        return replace(self, built=build(self.files.directory, self.built.spec, None))

    def read(self, report: Callable[[float], None], vocab_size: int) -> DraftModel:
        """Read the weights, and propose some tokens to try the model.

        Args:
            report: Called with the share of the weights that is read.
            vocab_size: Number of token ids that the target scores.

        Raises:
            ModelUnsupported: A file cannot be read, or the model raises.
        """
        module = self.built.model
        read_files(self.files.located.path, module, report)
        model = DraftModel(module, CachePieces.of(module), self.plan.probe.vocab_size)
        try:
            Proposer(model, vocab_size).propose(0, [0], 0, MAX_DRAFT)
        except Exception as error:
            recover()
            logger.exception("the draft model failed")
            text = (
                f"it raised {type(error).__name__} at its first tokens; the log has the traceback"
            )
            raise _unfit(self.files.located, text) from error
        return model

    @property
    def info(self) -> DraftInfo:
        """Description of the draft model."""
        located = self.files.located
        return DraftInfo(
            name=located.path.name,
            path=str(located.path),
            architecture=str(self.built.config["model_type"]),
            weight_bytes=weight_bytes(self.built.model),
            context_length=self.built.context_length,
        )


def _difference(target: dict[str, int], draft: dict[str, int]) -> str:
    """Describe the difference of two vocabularies; empty if there is none."""
    if target == draft:
        return ""
    own = {id_: text for text, id_ in target.items()}
    others = {id_: text for text, id_ in draft.items()}
    ids = sorted(id_ for id_ in own.keys() | others.keys() if own.get(id_) != others.get(id_))
    if not ids:
        return f"{len(draft)} instead of {len(target)}"
    first = ids[0]
    return (
        f"{len(draft)} instead of {len(target)}, and {len(ids)} ids differ, such as {first}, which "
        f"is {_shown(others.get(first))} instead of {_shown(own.get(first))}"
    )


def _shown(token: str | None) -> str:
    return "missing" if token is None else repr(token[:_SHOWN_CHARS])


def _unfit(located: Located, why: str) -> ModelUnsupported:
    path = str(located.path)
    return ModelUnsupported(f"{path} cannot be used as draft_model: {why}", model=path)
