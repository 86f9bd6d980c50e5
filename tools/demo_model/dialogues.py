"""Write conversations for the demo model: small talk, simple questions, and calls of tools.

The conversations are made from the phrases in ``small_talk`` and ``tool_families``, with random
words from ``words``.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from tools.demo_model import small_talk, tool_families
from tools.demo_model.tool_families import Family
from tools.demo_model.words import Words

TOOL_SHARE = 0.6
SYSTEM_SHARE = 0.3
MAX_TOOLS = 3

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """A conversation up to an answer of the assistant, and the tools on offer."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


def dialogues(count: int, seed: int, *, held_out: bool) -> list[Dialogue]:
    """Write ``count`` conversations with the words of one side of the split."""
    writer = Writer(seed, held_out=held_out)
    return [writer.dialogue() for _ in range(count)]


def user(text: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return an answer in words."""
    return {"role": "assistant", "content": text}


def call(name: str, arguments: dict[str, Any]) -> Message:
    """Return an answer with a call of a tool."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@dataclass(frozen=True)
class Offer:
    """A tool on offer in one conversation: a kind of tools with chosen names."""

    family: Family
    name: str
    parameters: tuple[str, ...]

    def schema(self, description: str) -> Tool:
        """Return the tool in the form of a request."""
        kinds = {
            name: {"type": parameter.type}
            for name, parameter in zip(self.parameters, self.family.parameters, strict=True)
        }
        schema = {"type": "object", "properties": kinds, "required": list(kinds)}
        function = {"name": self.name, "description": description, "parameters": schema}
        return {"type": "function", "function": function}


class Writer:
    """Source of random conversations."""

    def __init__(self, seed: int, *, held_out: bool) -> None:
        """Draw from ``seed``, with the words of one side of the split."""
        self._rng = random.Random(seed)
        self._words = Words(self._rng, held_out=held_out)

    def dialogue(self) -> Dialogue:
        """Write one conversation."""
        if self._rng.random() < TOOL_SHARE:
            return self._with_tools()
        turns = self._talk()
        return Dialogue((*self._system(), *turns))

    def with_call(self) -> Dialogue:
        """Write a conversation whose last message calls a tool."""
        offers = self._offers()
        return Dialogue((*self._system(), *self._request(offers[0])), self._schemas(offers))

    def _system(self) -> list[Message]:
        if self._rng.random() >= SYSTEM_SHARE:
            return []
        return [{"role": "system", "content": self._rng.choice(small_talk.SYSTEMS)}]

    # Conversations without tools.

    def _talk(self) -> list[Message]:
        kinds = (
            *(self._greeting, self._who, self._term, self._how_to, self._fact, self._name),
            self._unanswered,
        )
        weights = (3, 1, 4, 4, 2, 3, 1)
        chosen = self._rng.choices(kinds, weights, k=self._rng.choice((1, 1, 2, 3)))
        turns = [message for kind in chosen for message in kind()]
        return [*turns, *(self._closing() if self._rng.random() < 0.3 else ())]

    def _greeting(self) -> list[Message]:
        questions, answers = self._rng.choice(small_talk.GREETINGS)
        return [user(self._rng.choice(questions)), assistant(self._rng.choice(answers))]

    def _closing(self) -> list[Message]:
        questions, answer = self._rng.choice(small_talk.CLOSINGS)
        return [user(self._rng.choice(questions)), assistant(answer)]

    def _who(self) -> list[Message]:
        return [user(self._rng.choice(small_talk.WHO_QUESTIONS)), assistant(small_talk.WHO_ANSWER)]

    def _term(self) -> list[Message]:
        term, meaning, example = self._rng.choice(small_talk.TERMS)
        question = Template(self._rng.choice(small_talk.TERM_QUESTIONS)).substitute(t=term)
        turns = [user(question), assistant(meaning)]
        if self._rng.random() < 0.4:
            turns += [user(self._rng.choice(small_talk.EXAMPLE_QUESTIONS)), assistant(example)]
        return turns

    def _how_to(self) -> list[Message]:
        task, answer = self._rng.choice(small_talk.HOW_TO)
        question = Template(self._rng.choice(small_talk.HOW_TO_QUESTIONS)).substitute(t=task)
        return [user(question), assistant(answer)]

    def _fact(self) -> list[Message]:
        question, answer = self._rng.choice(small_talk.FACTS)
        return [user(question), assistant(answer)]

    def _name(self) -> list[Message]:
        name = self._words.person()
        opening = self._rng.choice(("My name is $a.", "I am $a.", "Hello, I am $a.", "Call me $a."))
        turns = [
            user(Template(opening).substitute(a=name)),
            assistant(f"Hello, {name}! How can I help you?"),
        ]
        if self._rng.random() < 0.7:
            question = self._rng.choice(("What is my name?", "Who am I?", "Do you know my name?"))
            turns += [user(question), assistant(f"Your name is {name}.")]
        return turns

    def _unanswered(self, offers: Sequence[Offer] = ()) -> list[Message]:
        """Write a question for a tool not on offer."""
        offer = self._offer(self._other_family(offers))
        question, _ = self._request(offer)
        return [question, assistant(small_talk.NO_TOOL)]

    # Conversations with tools.

    def _with_tools(self) -> Dialogue:
        offers = self._offers()
        turns: list[Message] = []
        kind = self._rng.random()
        if kind < 0.12:
            turns += self._talk()
        elif kind < 0.17:
            turns += self._unanswered(offers)
        for _ in range(0 if kind < 0.08 else 2 if kind > 0.85 else 1):
            turns += self._exchange(self._rng.choice(offers))
        return Dialogue((*self._system(), *turns), self._schemas(offers))

    def _offers(self) -> list[Offer]:
        offers: list[Offer] = []
        for _ in range(self._rng.choice((1, 1, 2, MAX_TOOLS))):
            offers.append(self._offer(self._other_family(offers)))
        return offers

    def _other_family(self, offers: Sequence[Offer]) -> Family:
        """Draw a kind of tools not on offer yet."""
        taken = {name for offer in offers for name in offer.family.names}
        while taken.intersection((family := self._family()).names):
            pass
        return family

    def _family(self) -> Family:
        kind = self._rng.random()
        if kind < 0.15:
            return tool_families.WEATHER
        if kind < 0.4:
            return tool_families.property_family(self._rng.choice(tool_families.PROPERTIES))
        return self._rng.choice(tool_families.FAMILIES)

    def _offer(self, family: Family) -> Offer:
        names = tuple(self._rng.choice(parameter.names) for parameter in family.parameters)
        return Offer(family, self._rng.choice(family.names), names)

    def _schemas(self, offers: list[Offer]) -> tuple[Tool, ...]:
        shown = [offer.schema(self._rng.choice(offer.family.descriptions)) for offer in offers]
        self._rng.shuffle(shown)
        return tuple(shown)

    def _request(self, offer: Offer) -> list[Message]:
        """Write a question and the call."""
        values = [self._argument(parameter.kind) for parameter in offer.family.parameters]
        return self._asked(offer, values)

    def _asked(self, offer: Offer, values: list[str | int]) -> list[Message]:
        question = Template(self._rng.choice(offer.family.questions))
        text = self._spoken(question.substitute(dict(zip("ab", values, strict=False))))
        return [user(text), call(offer.name, dict(zip(offer.parameters, values, strict=True)))]

    def _exchange(self, offer: Offer) -> Iterator[Message]:
        """Write a question, a call, a result, and an answer with the result."""
        values = [self._argument(parameter.kind) for parameter in offer.family.parameters]
        yield from self._asked(offer, values)
        result, answer = self._rng.choice(offer.family.outcomes)
        drawn = {**dict(zip("ab", values, strict=False)), **self._drawn()}
        yield {"role": "tool", "content": Template(result).substitute(drawn)}
        yield assistant(Template(answer).substitute(drawn))
        if self._rng.random() < 0.15:
            yield from self._closing()

    def _drawn(self) -> dict[str, Any]:
        words = self._words
        return {
            "n": words.number(1, 99),
            "big": words.number(100, 99999),
            "sky": self._rng.choice(tool_families.SKIES),
            "time": f"{words.number(0, 23)}:{words.number(0, 59):02}",
            "word": words.noun(),
        }

    def _argument(self, kind: str) -> str | int:
        words = self._words
        if kind == "number":
            return words.number(1, 99) if self._rng.random() < 0.7 else words.number(100, 9999)
        if kind == "path":
            return f"{words.noun()}.{self._rng.choice(('txt', 'py', 'md', 'json', 'csv'))}"
        if kind == "task":
            verbs = ("call", "visit", "write to", "meet", "thank")
            return f"{self._rng.choice(verbs)} {words.person()}"
        if "|" in kind:
            return self._rng.choice(kind.split("|"))
        draw = {"place": words.place, "person": words.person, "noun": words.noun}[kind]
        return draw()

    def _spoken(self, question: str) -> str:
        """Vary how a question is put."""
        kind = self._rng.random()
        if kind < 0.08:
            return f"One more thing. {question}"
        if kind < 0.16:
            return f"Hello! {question}"
        if kind < 0.22:
            return f"{question} Thank you."
        if kind < 0.28:
            return question.rstrip("?.")
        return question
