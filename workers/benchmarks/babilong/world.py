"""Small worlds in the manner of bAbI (Weston et al. 2015, arXiv 1502.05698), one kind for each of its twenty tasks.

Every story is drawn from a key. Its answer is one of the labels of its task, and follows from the facts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from workers.benchmarks.texts.draws import Draw


@dataclass(frozen=True, slots=True)
class Story:
    """Facts in their order, a question about them, and the numbers of the facts that decide its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


PEOPLE: tuple[str, ...] = ("Mary", "John", "Daniel", "Sandra")
GIVERS: tuple[str, ...] = ("Fred", "Jeff", "Bill", "Mary")
VISITORS: tuple[str, ...] = ("Fred", "Julie", "Bill", "Mary")
PLACES: tuple[str, ...] = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
SPOTS: tuple[str, ...] = ("bedroom", "cinema", "kitchen", "office", "park", "school")
SPECIES: tuple[str, ...] = ("frog", "lion", "rhino", "swan")
THINGS: tuple[str, ...] = ("apple", "football", "milk")
GOES: tuple[str, ...] = ("went to", "moved to", "journeyed to", "travelled to", "went back to")
TAKES: tuple[str, ...] = ("took", "got", "grabbed", "picked up")
DROPS: tuple[str, ...] = ("dropped", "left", "discarded", "put down")
GIVES: tuple[str, ...] = ("gave", "handed", "passed")
NEXT: tuple[str, ...] = ("After that", "Then", "Afterwards", "Following that")
NUMBERS: tuple[str, ...] = ("one", "two", "three")
SIDES = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


@dataclass
class _World:
    """People who go about, and things that they carry. Facts are counted from 0."""

    draw: Draw
    people: Sequence[str] = PEOPLE
    facts: list[str] = field(default_factory=list[str])
    place: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    """By person: the place, and the fact that says so."""
    carried: dict[str, list[tuple[str, int]]] = field(default_factory=dict[str, list[tuple[str, int]]])
    """By person: the things in the order in which they came, each with its fact."""
    visits: dict[str, list[tuple[str, tuple[int, ...]]]] = field(
        default_factory=dict[str, list[tuple[str, tuple[int, ...]]]]
    )
    """By thing: its places in their order, each with the facts that say so."""
    lying: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict[str, tuple[str, tuple[int, ...]]])
    """By thing that nobody carries: its place, and the facts that say so."""

    def say(self, fact: str) -> int:
        self.facts.append(fact)
        return len(self.facts) - 1

    def go(self) -> None:
        person = self.draw.choice(self.people)
        before = self.place.get(person, ("", 0))[0]
        place = self.draw.choice([other for other in PLACES if other != before])
        number = self.say(f"{person} {self.draw.choice(GOES)} the {place}.")
        self.place[person] = (place, number)
        for thing, taken in self.carried.get(person, []):
            self._note(thing, place, (taken, number))

    def take(self) -> None:
        free = [thing for thing in THINGS if thing not in {held for of in self.carried.values() for held, _ in of}]
        near = [
            (person, thing)
            for person, (place, _) in self.place.items()
            for thing in free
            if self.lying.get(thing, (place, ()))[0] == place
        ]
        if not near:
            self.go()
            return
        person, thing = self.draw.choice(near)
        there = self.draw.choice(("", " there"))
        number = self.say(f"{person} {self.draw.choice(TAKES)} the {thing}{there}.")
        self.carried.setdefault(person, []).append((thing, number))
        self.lying.pop(thing, None)
        self._note(thing, self.place[person][0], (number, self.place[person][1]))

    def drop(self) -> None:
        holders = [person for person, held in self.carried.items() if held]
        if not holders:
            self.take()
            return
        person = self.draw.choice(holders)
        held = self.draw.choice(self.carried[person])
        self.carried[person].remove(held)
        there = self.draw.choice(("", " there"))
        number = self.say(f"{person} {self.draw.choice(DROPS)} the {held[0]}{there}.")
        place, arrived = self.place.get(person, ("", number))  # whoever was given it may never have gone anywhere
        self.lying[held[0]] = (place, (arrived, number))

    def give(self) -> tuple[str, str, str, int] | None:
        """(giver, thing, receiver, fact); None where nobody has a thing, and somebody takes one."""
        holders = [person for person, held in self.carried.items() if held]
        if not holders:
            self.take()
            return None
        giver = self.draw.choice(holders)
        held = self.draw.choice(self.carried[giver])
        receiver = self.draw.choice([person for person in self.people if person != giver])
        self.carried[giver].remove(held)
        number = self.say(f"{giver} {self.draw.choice(GIVES)} the {held[0]} to {receiver}.")
        self.carried.setdefault(receiver, []).append((held[0], number))
        return giver, held[0], receiver, number

    def where(self, thing: str) -> tuple[str, tuple[int, ...]] | None:
        """The place of a thing that was taken, and the facts that say so."""
        if thing in self.lying:
            return self.lying[thing]
        return self.visits[thing][-1] if thing in self.visits else None

    def live(self, steps: int, *moves: Callable[[], object]) -> None:
        for _ in range(steps):
            self.draw.choice(moves)()

    def _note(self, thing: str, place: str, facts: tuple[int, ...]) -> None:
        before = self.visits.setdefault(thing, [])
        if not before or before[-1][0] != place:
            before.append((place, facts))

    def told(self, question: str, answer: str, *support: int) -> Story:
        return Story(tuple(self.facts), question, answer, tuple(sorted({*support})))


def _single_fact(draw: Draw) -> Story:
    world = _World(draw)
    world.live(2 + draw.below(9), world.go)
    person = draw.choice(sorted(world.place))
    return world.told(f"Where is {person}?", *world.place[person])


def _two_facts(draw: Draw) -> Story:
    world = _World(draw)
    world.live(2 + draw.below(12), world.go, world.go, world.take, world.drop)
    while not world.visits:
        world.take()
    thing = draw.choice(sorted(world.visits))
    found = world.where(thing)
    assert found is not None
    return world.told(f"Where is the {thing}?", found[0], *found[1])


def _three_facts(draw: Draw) -> Story:
    """Asks for the place before the last one, if the thing was there once only."""
    while True:
        world = _World(draw)
        world.live(4 + draw.below(12), world.go, world.go, world.take, world.drop)
        once = {
            thing: found
            for thing, found in world.visits.items()
            if len(found) > 1 and [place for place, _ in found].count(found[-1][0]) == 1
        }
        if once:
            thing = draw.choice(sorted(once))
            (before, first), (place, second) = once[thing][-2:]
            return world.told(f"Where was the {thing} before the {place}?", before, *first, *second)


def _two_arguments(draw: Draw) -> Story:
    first, middle, last = draw.sample(PLACES, 3)
    side = draw.choice([*SIDES])
    facts = draw.shuffled([f"The {first} is {side} of the {middle}.", f"The {middle} is {side} of the {last}."])
    if draw.below(2):
        fact, question, answer = f"The {first} ", f"What is {side} of the {middle}?", first
    else:
        fact, question, answer = f"The {middle} ", f"What is the {middle} {side} of?", last
    return Story(tuple(facts), question, answer, tuple(at for at in range(2) if facts[at].startswith(fact)))


def _three_arguments(draw: Draw) -> Story:
    world = _World(draw, people=GIVERS)
    given: list[tuple[str, str, str, int]] = []
    while not given:
        for _ in range(4 + draw.below(14)):
            if draw.below(2):
                draw.choice((world.go, world.take))()
            elif (found := world.give()) is not None:
                given.append(found)
    giver, thing, receiver, number = given[-1]
    question, answer = draw.choice(
        (
            (f"What did {giver} give to {receiver}?", thing),
            (f"Who gave the {thing} to {receiver}?", giver),
            (f"Who did {giver} give the {thing} to?", receiver),
            (f"Who gave the {thing}?", giver),
            (f"Who received the {thing}?", receiver),
        )
    )
    return world.told(question, answer, number)


def _yes_or_no(draw: Draw) -> Story:
    world = _World(draw)
    world.live(2 + draw.below(9), world.go, world.go, world.take)
    person = draw.choice(sorted(world.place))
    place, number = world.place[person]
    asked = place if draw.below(2) else draw.choice([other for other in PLACES if other != place])
    return world.told(f"Is {person} in the {asked}?", "yes" if asked == place else "no", number)


def _carrying(draw: Draw) -> tuple[_World, str, list[tuple[str, int]]]:
    world = _World(draw)
    world.live(2 + draw.below(9), world.go, world.take, world.take, world.drop, world.give)
    while not world.carried:
        world.take()
    person = draw.choice(sorted(world.carried))
    return world, person, world.carried[person]


def _counting(draw: Draw) -> Story:
    """Never asks about empty hands: the scorer finds `one` in `none`, so that no answer would be right."""
    while True:
        world, person, held = _carrying(draw)
        if held:
            question = f"How many objects is {person} carrying?"
            return world.told(question, NUMBERS[len(held) - 1], *(number for _, number in held))


def _listing(draw: Draw) -> Story:
    world, person, held = _carrying(draw)
    support = [number for _, number in held] or _about(world, person)
    return world.told(f"What is {person} carrying?", ",".join(thing for thing, _ in held) or "nothing", *support)


def _about(world: _World, person: str) -> list[int]:
    """The last fact about a person who has given or put away everything."""
    names = f"{person} "
    gone = (*DROPS, *GIVES)
    facts = enumerate(world.facts)
    return [at for at, fact in facts if fact.startswith(names) and fact.removeprefix(names).startswith(gone)][-1:]


def _negation(draw: Draw) -> Story:
    facts: list[str] = []
    known: dict[str, tuple[str, bool, int]] = {}
    for number in range(2 + draw.below(9)):
        person, place = draw.choice(PEOPLE), draw.choice(PLACES)
        form = draw.below(4)
        words = (f"is in the {place}", f"{draw.choice(GOES)} the {place}", f"is not in the {place}")[min(form, 2)]
        if form == 3:
            words = f"is no longer in the {place}"
        facts.append(f"{person} {words}.")
        known[person] = (place, form < 2, number)
    person = draw.choice(sorted(known))
    place, there, number = known[person]
    asked = draw.choice([other for other in PLACES if other != place]) if there and draw.below(2) else place
    return Story(tuple(facts), f"Is {person} in the {asked}?", "yes" if there and asked == place else "no", (number,))


def _indefinite(draw: Draw) -> Story:
    facts: list[str] = []
    known: dict[str, tuple[list[str], int]] = {}
    for number in range(2 + draw.below(9)):
        person, places = draw.choice(VISITORS), draw.sample(SPOTS, 1 + draw.below(2))
        either = f"is either in the {places[0]} or the {places[-1]}"
        sure = draw.choice((f"is in the {places[0]}", f"{draw.choice(GOES)} the {places[0]}"))
        facts.append(f"{person} {either if len(places) == 2 else sure}.")
        known[person] = (places, number)
    person = draw.choice(sorted(known))
    places, number = known[person]
    inside = draw.below(3) > 0
    asked = draw.choice(places if inside else [other for other in SPOTS if other not in places])
    answer = ("yes" if len(places) == 1 else "maybe") if inside else "no"
    return Story(tuple(facts), f"Is {person} in the {asked}?", answer, (number,))


def _walks(groups: Callable[[Draw], list[str]], pronoun: bool) -> Callable[[Draw], Story]:
    """Stories of one or two people who go to a place and, with a pronoun in their names' place, to another."""

    def story(draw: Draw) -> Story:
        facts: list[str] = []
        place: dict[str, tuple[str, tuple[int, ...]]] = {}
        for _ in range(1 + draw.below(5)):
            people, (first, second) = groups(draw), draw.sample(PLACES, 2)
            facts.append(f"{' and '.join(people)} {draw.choice(GOES)} the {first}.")
            support = (len(facts) - 1,)
            if pronoun:
                they = "they" if len(people) > 1 else "she" if people[0] in ("Mary", "Sandra") else "he"
                facts.append(f"{draw.choice(NEXT)} {they} {draw.choice(GOES)} the {second}.")
                support = (len(facts) - 2, len(facts) - 1)
            place |= dict.fromkeys(people, (second if pronoun else first, support))
        person = draw.choice(sorted(place))
        answer, numbers = place[person]
        return Story(tuple(facts), f"Where is {person}?", answer, numbers)

    return story


def _one(draw: Draw) -> list[str]:
    return [draw.choice(PEOPLE)]


def _two(draw: Draw) -> list[str]:
    return draw.sample(PEOPLE, 2)


def _times(draw: Draw) -> Story:
    times = ("yesterday", "this morning", "this afternoon", "this evening")
    visits: dict[str, list[str]] = {}
    told: list[tuple[str, str]] = []
    for person in draw.sample(VISITORS, 1 + draw.below(3)):
        visits[person] = draw.sample(SPOTS, 2 + draw.below(3))
        for time, place in zip(times, visits[person], strict=False):
            words = f"{person} {draw.choice(GOES)} the {place}"
            fact = f"{words} {time}." if draw.below(2) else f"{time.capitalize()} {words}."
            told.append((f"{person} {place}", fact))
    told = draw.shuffled(told)
    person = draw.choice(sorted(visits))
    at = 1 + draw.below(len(visits[person]) - 1)
    before, place = visits[person][at - 1 : at + 1]
    wanted = {f"{person} {before}", f"{person} {place}"}
    support = tuple(number for number, (name, _) in enumerate(told) if name in wanted)
    return Story(tuple(fact for _, fact in told), f"Where was {person} before the {place}?", before, support)


def _deduction(draw: Draw) -> Story:
    plural = {"cat": "cats", "mouse": "mice", "sheep": "sheep", "wolf": "wolves"}
    fears = {kind: draw.choice([other for other in plural if other != kind]) for kind in plural}
    kinds = {name: draw.choice([*plural]) for name in ("Gertrude", "Winona", "Emily", "Jessica")}
    name = draw.choice([*kinds])
    law = {kind: f"{plural[kind].capitalize()} are afraid of {plural[feared]}." for kind, feared in fears.items()}
    being = {name: f"{name} is a {kind}." for name, kind in kinds.items()}
    facts = draw.shuffled([*law.values(), *being.values()])
    support = sorted((facts.index(being[name]), facts.index(law[kinds[name]])))
    return Story(tuple(facts), f"What is {name.lower()} afraid of?", fears[kinds[name]], tuple(support))


def _induction(draw: Draw) -> Story:
    """All of one kind have one colour; the colour of the one that is asked for is not told."""
    names = draw.shuffled(("Lily", "Bernhard", "Brian", "Julius", "Greg"))
    kinds = draw.sample(SPECIES, 3)
    colors = dict(zip(kinds, draw.sample(("gray", "green", "white", "yellow"), 3), strict=True))
    of: dict[str, str] = dict(zip(names, [kinds[0], kinds[0], *kinds[1:], draw.choice(kinds)], strict=True))
    asked, other = names[:2]
    being = {name: f"{name} is a {kind}." for name, kind in of.items()}
    color = {name: f"{name} is {colors[kind]}." for name, kind in of.items() if name != asked}
    facts = draw.shuffled([*being.values(), *color.values()])
    support = sorted((facts.index(being[asked]), facts.index(being[other]), facts.index(color[other])))
    return Story(tuple(facts), f"What color is {asked}?", colors[of[asked]], tuple(support))


def _positions(draw: Draw) -> Story:
    words = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, 1), "below": (0, -1)}
    shapes = ("triangle", "pink rectangle", "blue square", "red sphere", "yellow square", "red square")
    first, middle, last = draw.sample(shapes, 3)
    left, right = draw.choice([*words]), draw.choice([*words])
    facts = [f"The {first} is {left} the {middle}.", f"The {last} is {right} the {middle}."]
    asked = draw.choice([*words])
    (x, y), (u, v), (dx, dy) = words[left], words[right], words[asked]
    answer = "yes" if (x - u) * dx + (y - v) * dy > 0 else "no"
    return Story(tuple(facts), f"Is the {first} {asked} the {last}?", answer, (0, 1))


def _sizes(draw: Draw) -> Story:
    """The things from the smallest on; neighbours are compared."""
    sizes = draw.shuffled(("chocolate", "box of chocolates", "suitcase", "container", "chest"))
    told = [
        draw.choice((f"The {small} fits inside the {large}.", f"The {large} is bigger than the {small}."))
        for small, large in pairwise(sizes)
    ]
    facts = draw.shuffled(told)
    low, high = sorted(draw.sample(range(len(sizes)), 2))
    support = tuple(sorted(facts.index(told[at]) for at in range(low, high)))
    one, other = draw.shuffled((low, high))
    if draw.below(2):
        question, yes = f"Does the {sizes[one]} fit in the {sizes[other]}?", one < other
    else:
        question, yes = f"Is the {sizes[one]} bigger than the {sizes[other]}?", one > other
    return Story(tuple(facts), question, "yes" if yes else "no", support)


def _paths(draw: Draw) -> Story:
    """Six places on a grid, five of them next to an earlier one; the way that is asked for takes two steps."""
    names: list[str] = draw.shuffled(PLACES)
    at: dict[str, tuple[int, int]] = {names[0]: (0, 0)}
    links: dict[tuple[str, str], tuple[str, int]] = {}
    facts: list[str] = []
    opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
    for name in names[1:]:
        free = [
            (other, side)
            for other, (x, y) in at.items()
            for side, (dx, dy) in SIDES.items()
            if (x + dx, y + dy) not in at.values()
        ]
        other, side = draw.choice(free)
        (x, y), (dx, dy) = at[other], SIDES[side]
        at[name] = (x + dx, y + dy)
        links[other, name], links[name, other] = (side, len(facts)), (opposite[side], len(facts))
        facts.append(
            draw.choice((f"The {name} is {side} of the {other}.", f"The {other} is {opposite[side]} of the {name}."))
        )
    ways = [
        (start, end, links[start, middle], links[middle, end])
        for start, middle in links
        for other, end in links
        if other == middle and end != start
    ]
    start, end, (first, one), (second, two) = draw.choice(ways)
    order = draw.shuffled(range(len(facts)))
    support = tuple(sorted((order.index(one), order.index(two))))
    question = f"How do you go from the {start} to the {end}?"
    return Story(tuple(facts[number] for number in order), question, f"{first[0]},{second[0]}", support)


def _motives(draw: Draw) -> Story:
    moods = {"tired": "bedroom", "hungry": "kitchen", "thirsty": "kitchen", "bored": "garden"}
    gets = {"tired": "pajamas", "hungry": "apple", "thirsty": "milk", "bored": "football"}
    facts: list[str] = []
    asked: list[tuple[str, str, int]] = []
    for name in draw.sample(("Sumit", "Yann", "Jason", "Antoine"), 1 + draw.below(3)):
        mood, stage = draw.choice([*moods]), draw.below(3)
        facts.append(f"{name} is {mood}.")
        number, place = len(facts) - 1, moods[mood]
        who = name.lower()
        if stage == 0:
            asked.append((f"Where will {who} go?", place, number))
            continue
        facts.append(f"{name} {draw.choice(GOES)} the {place}.")
        asked.append((f"Why did {who} go to the {place}?", mood, number))
        if stage == 2:
            facts.append(f"{name} {draw.choice(TAKES)} the {gets[mood]} there.")
            asked[-1] = draw.choice((asked[-1], (f"Why did {who} get the {gets[mood]}?", mood, number)))
    question, answer, number = draw.choice(asked)
    return Story(tuple(facts), question, answer, (number,))


STORIES: Mapping[str, Callable[[Draw], Story]] = {
    "qa1": _single_fact,
    "qa2": _two_facts,
    "qa3": _three_facts,
    "qa4": _two_arguments,
    "qa5": _three_arguments,
    "qa6": _yes_or_no,
    "qa7": _counting,
    "qa8": _listing,
    "qa9": _negation,
    "qa10": _indefinite,
    "qa11": _walks(_one, pronoun=True),
    "qa12": _walks(_two, pronoun=False),
    "qa13": _walks(_two, pronoun=True),
    "qa14": _times,
    "qa15": _deduction,
    "qa16": _induction,
    "qa17": _positions,
    "qa18": _sizes,
    "qa19": _paths,
    "qa20": _motives,
}
"""A story of each task from a stream of draws."""
