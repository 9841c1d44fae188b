"""What an evaluation is: items that a ring answers one by one, each answer a record that is kept.

A task's items are a function of the spec and the seed alone, and so is each answer, whichever ring
gives it. So an evaluation may be killed at any moment: what has a record is not asked again, and
the figures come out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from ringworld_jobs.evaluate_spec import TaskSpec
from ringworld_jobs.spec import DataSpec
from ringworld_model.decode import DecodeSession
from ringworld_model.generate import generate
from ringworld_model.sampling.answer import Answer, collect
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import DrawSettings, SamplingSettings

if TYPE_CHECKING:
    from ringworld_workers.generation.loading import LoadedModel

Record = dict[str, Any]
"""One item's answer as JSON: ``id``, its facts, the answer, the score."""

GREEDY = DrawSettings(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to ask.

    Attributes:
        id: unlike for any two items of the task; what names its record after a kill.
        facts: plain data that says what is asked; all of it goes into the record.
    """

    id: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, the same on every rank.

    Attributes:
        loaded: the model with all that belongs to it.
        stage_name: the stage whose model it is.
        seed: of the job; what a task draws, it draws from this and an item's id.
        context_length: longest row that is asked for: the stage's.
        sources: folder or URL of each prepared dataset of the job, for tasks on held-out data.
        mixture: share of each source in the stage.
        first_mixture: that of the job's first stage.
        first_context_length: of the job's first stage.
        data: which examples are drawn from each source, and where remote ones are kept.
        earlier: the figures of the same job's evaluations of the stages before this one, oldest
            first, as ``{"task", "stage", "stage_index", figure: value, ...}``.
        files_url: of the store that files of answers go to.
    """

    loaded: LoadedModel
    stage_name: str
    seed: int
    context_length: int
    sources: Mapping[str, str] = field(default_factory=dict)
    mixture: Mapping[str, float] = field(default_factory=dict)
    first_mixture: Mapping[str, float] = field(default_factory=dict)
    first_context_length: int = 0
    data: DataSpec = field(default_factory=DataSpec)
    earlier: Sequence[Record] = ()
    files_url: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluationRing:
    """One ring of ranks that all hold the whole model; its methods are collectives of the ring.

    Attributes:
        loaded: the model with all that belongs to it.
        group: the ring; None: this rank alone.
        rank: this rank's place in the ring.
        size: ranks of the ring.
        device: where the model is.
        progress: says what this rank is about to do within an item, so that a long one is not
            taken for a stall.
    """

    loaded: LoadedModel
    group: dist.ProcessGroup | None
    rank: int
    size: int
    device: torch.device
    progress: Callable[[str], None] = lambda text: None

    def session(self, max_length: int | None = None) -> DecodeSession:
        """A new session on this ring, for many questions on one document.

        Args:
            max_length: tokens of a row at most; None: the model's context length.
        """
        limit = max_length or self.loaded.context_length
        return DecodeSession(self.loaded.model, self.group, max_length=limit)

    def ask(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        stop: Sequence[str] = (),
        session: DecodeSession | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Greedy answers in text, the same on every rank of the ring; eos ends one.

        Args:
            prompts: at least one; all are answered at the same time.
            max_new_tokens: most tokens of each answer.
            stop: texts that end an answer.
            session: to ask in; None: a new one.
            rows: of that session, which the prompts continue; see ``generate``.

        Raises:
            ValueError: a prompt and its answer do not fit the model's context.
        """
        tokenizer = self.loaded.tokenizer
        settings = SamplingSettings(
            text=GREEDY,
            max_new_tokens=max_new_tokens,
            stop_ids=(tokenizer.eos_id,),
            stop=tuple(stop),
        )
        events = generate(
            session or self.session(),
            prompts,
            settings,
            decode=tokenizer.decode,
            rows=rows,
            on_chunk=lambda done, total: self.progress(f"{done:,}/{total:,} tokens"),
        )
        return collect(events, len(prompts))


class Task(Protocol):
    """One thing that is asked of a model; see ``registry`` for how it is made."""

    name: str

    def items(self) -> Sequence[Item]:
        """All there is to ask; the same list on every rank and after every restart."""

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """Ask some of the items, on one ring. A collective: all its ranks iterate alike.

        Yields:
            A JSON record for each item, in any order, as soon as it is there: ``id``, a summary of
            what was asked, the answer and its score; the item's facts are added. No clock in it,
            and nothing else that would differ if the item were asked again.
        """

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """The figures, from the records of all items in the order of the items.

        Returns:
            The main one first. A figure X is what the settings ``min_X`` and ``max_X`` limit.
        """


MakeTask = Callable[[TaskSpec, Subject], Task]
"""How a task is made: from its settings in the spec and what is evaluated."""
