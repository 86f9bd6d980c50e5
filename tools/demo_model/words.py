"""Words for written conversations: names from lists, and invented ones.

Invented words are in most conversations, so that the model learns to copy a word it has not seen
rather than to choose one that it knows.
"""

import random
import zlib
from collections.abc import Callable

INVENTED = 0.6
HELD_OUT_IN = 10


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = _words(
    """Aachen Aarhus Accra Athens Austin Bari Basel Berlin Bern Bogota Bonn Boston Bremen Brno
    Brussels Cairo Chicago Cologne Copenhagen Cork Dakar Dallas Delhi Denver Dresden Dublin Essen
    Florence Geneva Genoa Ghent Glasgow Graz Hamburg Hanoi Helsinki Istanbul Jena Kassel Kiel Kyoto
    Lagos Leeds Leipzig Lima Linz Lisbon London Lyon Madrid Mainz Malaga Manila Miami Milan Moscow
    Munich Nairobi Naples Nice Oslo Ottawa Oxford Paris Perth Porto Prague Quito Riga Rome Salzburg
    Seattle Seoul Seville Sofia Stuttgart Sydney Tallinn Tokyo Toronto Trier Turin Ulm Utrecht
    Valencia Venice Vienna Vilnius Warsaw Weimar York Zagreb Zurich"""
)
PEOPLE = _words(
    """Ada Alan Alice Amir Anna Anton Ben Bob Carla Carol Clara Dana David Diego Ella Emil Emma Eva
    Felix Frank Fred George Grace Greta Hanna Hugo Ida Ines Ivan Jack James Jane John Julia Karl
    Laura Lea Leo Lena Lisa Lucas Luis Maria Mark Max Maya Mia Mike Nina Noah Nora Olga Omar Oscar
    Paul Peter Rita Robin Rosa Ruth Sam Sara Simon Sofia Susan Theo Tim Tina Tom Uma Vera Victor
    Wanda Will Yara Zoe"""
)
NOUNS = _words(
    """apple bag ball bird boat book bottle box bread bridge car cat chair cheese clock cloud coat
    coffee cup desk dog door egg fish flower forest friend garden glass hat honey horse house island
    key lamp leaf letter milk moon mountain mouse ocean orange paper pencil piano plant queen rain
    ring river road rose salt school ship shoe snow spoon star stone street sugar table tea tiger
    train tree water wind window winter"""
)
ONSETS = _words("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr pl sch sh sl st tr")
VOWELS = _words("a e i o u a e i o ei au ie")
CODAS = (*("",) * 6, *_words("n r l s m t ck nd rg rt st x"))


class Words:
    """Random words of one side of the split, by a checksum of the word.

    A word that is held out occurs in no training conversation of this source.
    """

    def __init__(self, rng: random.Random, *, held_out: bool) -> None:
        """Draw from ``rng``."""
        self.rng = rng
        self._held_out = held_out

    def place(self) -> str:
        """Return the name of a place."""
        return self._name(PLACES)

    def person(self) -> str:
        """Return a first name."""
        return self._name(PEOPLE)

    def noun(self) -> str:
        """Return a lower-case word."""
        return self._name(NOUNS).lower()

    def invented(self) -> str:
        """Return a word of two or three made-up syllables, in upper case at the start."""
        return self._kept(self._syllables)

    def number(self, low: int, high: int) -> int:
        """Return a number from ``low`` to ``high``, both included."""
        return self.rng.randint(low, high)

    def _name(self, names: tuple[str, ...]) -> str:
        if self.rng.random() < INVENTED:
            return self.invented()
        return self._kept(lambda: self.rng.choice(names))

    def _syllables(self) -> str:
        count = self.rng.choice((1, 2, 2, 3))
        parts = (self.rng.choice(ONSETS) + self.rng.choice(VOWELS) for _ in range(count))
        return ("".join(parts) + self.rng.choice(CODAS)).capitalize()

    def _kept(self, draw: Callable[[], str]) -> str:
        """Return the first drawn word on this side of the split."""
        while True:
            word = draw()
            if (zlib.crc32(word.lower().encode()) % HELD_OUT_IN == 0) is self._held_out:
                return word
