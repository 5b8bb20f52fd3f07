"""The facts that the starter model learns, the ways to ask for them, and wrong claims about them.

Only text and the small classes that hold it: `trainer.dialogues` makes conversations of them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What a good answer says, whatever its manner; `accept` and `reject` are patterns as in `data.probes`."""

    topic: str
    subject: str
    short: tuple[str, ...]
    full: tuple[str, ...]
    accept: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()

    @property
    def bodies(self) -> tuple[str, ...]:
        return self.short + self.full


@dataclass(frozen=True, slots=True)
class Question:
    """A target with the ways to ask for it; `unseen` phrasings are never trained on."""

    target: Target
    asks: tuple[str, ...]
    unseen: tuple[str, ...]
    follow_ups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Relation:
    """A family of facts. In the templates {s} is the subject and {v} the value; subjects of one fact are
    separated by "|": questions use any of them, answers the first."""

    topic: str
    facts: Mapping[str, str]
    asks: tuple[str, ...]
    unseen: tuple[str, ...]
    says: tuple[str, ...]
    claim: str = ""
    follow_ups: tuple[str, ...] = ()


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def word_pattern(text: str) -> str:
    """A pattern that finds the text as whole words."""
    return rf"\b{re.escape(text)}\b".replace(r"\ ", " ")


def pairs(text: str) -> dict[str, str]:
    """The mapping written as `a: b, c: d`."""
    return dict(item.split(": ") for item in " ".join(text.split()).split(", "))


def both_ways(facts: Mapping[str, str]) -> dict[str, str]:
    return dict(facts) | {value: key for key, value in facts.items()}


# Facts ------------------------------------------------------------------------------------------------------

COUNTRIES = """France Paris Europe, Spain Madrid Europe, Italy Rome Europe, Germany Berlin Europe,
Portugal Lisbon Europe, Austria Vienna Europe, Greece Athens Europe, Poland Warsaw Europe,
Hungary Budapest Europe, Ireland Dublin Europe, Norway Oslo Europe, Sweden Stockholm Europe,
Finland Helsinki Europe, Denmark Copenhagen Europe, Belgium Brussels Europe, England London Europe,
Scotland Edinburgh Europe, Iceland Reykjavik Europe, Romania Bucharest Europe, Bulgaria Sofia Europe,
Croatia Zagreb Europe, Serbia Belgrade Europe, Ukraine Kyiv Europe, Latvia Riga Europe,
Estonia Tallinn Europe, Egypt Cairo Africa, Kenya Nairobi Africa, Ghana Accra Africa, Nigeria Abuja Africa,
Morocco Rabat Africa, Algeria Algiers Africa, Tunisia Tunis Africa, Senegal Dakar Africa,
Uganda Kampala Africa, Zambia Lusaka Africa, Rwanda Kigali Africa, Angola Luanda Africa, Libya Tripoli Africa,
Japan Tokyo Asia, China Beijing Asia, Thailand Bangkok Asia, Vietnam Hanoi Asia, Nepal Kathmandu Asia,
Iran Tehran Asia, Iraq Baghdad Asia, Jordan Amman Asia, Mongolia Ulaanbaatar Asia, Indonesia Jakarta Asia,
Peru Lima South-America, Chile Santiago South-America, Colombia Bogota South-America,
Ecuador Quito South-America, Venezuela Caracas South-America, Uruguay Montevideo South-America,
Argentina Buenos-Aires South-America, Brazil Brasilia South-America, Paraguay Asuncion South-America,
Canada Ottawa North-America, Mexico Mexico-City North-America, Cuba Havana North-America,
Jamaica Kingston North-America, Australia Canberra Oceania, Fiji Suva Oceania"""
ROWS = [row.replace("-", "_").split() for row in COUNTRIES.split(",")]
CAPITALS = {country: capital.replace("_", " ") for country, capital, _ in ROWS}
CONTINENTS = {country: continent.replace("_", " ") for country, _, continent in ROWS if continent != "Oceania"}
LANGUAGES = pairs("""France: French, Spain: Spanish, Italy: Italian, Germany: German, Portugal: Portuguese,
Austria: German, Greece: Greek, Poland: Polish, Hungary: Hungarian, Norway: Norwegian, Sweden: Swedish,
Finland: Finnish, Denmark: Danish, England: English, Iceland: Icelandic, Romania: Romanian, Egypt: Arabic,
Japan: Japanese, China: Chinese, Thailand: Thai, Vietnam: Vietnamese, Peru: Spanish, Chile: Spanish,
Brazil: Portuguese, Mexico: Spanish, Cuba: Spanish, Australia: English, Jamaica: English""")
COLOURS = pairs("""grass: green, the sky: blue, snow: white, coal: black, a banana: yellow, a tomato: red,
a carrot: orange, a lemon: yellow, blood: red, milk: white, chocolate: brown, a cucumber: green,
a raven: black, a polar bear: white, a flamingo: pink, an elephant: grey, a frog: green, the sun: yellow,
the sea: blue, a cherry: red, a strawberry: red, spinach: green, butter: yellow, salt: white,
a pumpkin: orange, broccoli: green, a swan: white, a fire engine: red, a crow: black, a plum: purple,
lavender: purple, cotton: white, a pea: green, a sunflower: yellow, a ruby: red, an emerald: green,
a sapphire: blue, tar: black, a lime: green, coffee: brown""")
SOUNDS = pairs("""a cow: moo, a dog: woof, a cat: meow, a duck: quack, a sheep: baa, a lion: roar,
a bee: buzz, a snake: hiss, a frog: croak, a horse: neigh, a pig: oink, a rooster: crow, an owl: hoot,
a wolf: howl, a mouse: squeak, a donkey: bray, a crow: caw, a hen: cluck, a turkey: gobble, a pigeon: coo,
a goose: honk""")
YOUNG = pairs("""a dog: puppy, a cat: kitten, a cow: calf, a horse: foal, a sheep: lamb, a goat: kid,
a pig: piglet, a bear: cub, a duck: duckling, a hen: chick, a kangaroo: joey, a deer: fawn, a frog: tadpole,
a goose: gosling, a swan: cygnet, an owl: owlet, a hare: leveret, a fish: fry, an eagle: eaglet,
a butterfly: caterpillar""")
LEGS = pairs("""a dog: four, a cat: four, a spider: eight, an ant: six, a bee: six, a hen: two,
a horse: four, a fly: six, a duck: two, a crab: ten, a beetle: six, a cow: four, an owl: two,
a scorpion: eight, a butterfly: six, a lizard: four, an ostrich: two""")
HOMES = pairs("""a bee: a hive, a bird: a nest, a dog: a kennel, a horse: a stable, a spider: a web,
a pig: a sty, a rabbit: a burrow, a bear: a den, a cow: a barn, a hen: a coop, a fish: the water,
a beaver: a lodge, a goldfish: a bowl, a king: a palace, a monk: a monastery, a camel: the desert,
a monkey: the jungle""")
OPPOSITES = both_ways(
    pairs("""hot: cold, big: small, up: down, day: night, happy: sad, fast: slow,
old: young, full: empty, rich: poor, hard: soft, light: dark, early: late, open: closed, strong: weak,
wet: dry, loud: quiet, long: short, high: low, left: right, in: out, good: bad, clean: dirty, thick: thin,
wide: narrow, near: far, true: false, first: last, always: never, love: hate, win: lose, buy: sell,
push: pull, laugh: cry, asleep: awake, deep: shallow, sweet: bitter, brave: afraid, cheap: expensive,
easy: difficult, begin: end, give: take, heavy: weightless, sharp: blunt, north: south, east: west,
friend: enemy, war: peace, question: answer""")
)
PLURALS = pairs("""mouse: mice, child: children, foot: feet, tooth: teeth, man: men, woman: women,
goose: geese, leaf: leaves, knife: knives, wolf: wolves, ox: oxen, person: people, city: cities, box: boxes,
baby: babies, bus: buses, half: halves, life: lives, potato: potatoes, hero: heroes, cat: cats, dog: dogs,
book: books, house: houses, tree: trees, fly: flies, wife: wives, shelf: shelves, dish: dishes,
story: stories""")
PASTS = pairs("""go: went, see: saw, eat: ate, run: ran, take: took, give: gave, come: came, write: wrote,
buy: bought, think: thought, bring: brought, sing: sang, swim: swam, know: knew, make: made, find: found,
sleep: slept, drink: drank, speak: spoke, teach: taught, catch: caught, fly: flew, fall: fell, grow: grew,
begin: began, build: built, feel: felt, forget: forgot, walk: walked, play: played""")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NEXT = {f"the day after {day}": DAYS[(i + 1) % 7] for i, day in enumerate(DAYS)} | {
    f"the month after {month}": MONTHS[(i + 1) % 12] for i, month in enumerate(MONTHS)
}
BEFORE = {f"the day before {day}": DAYS[i - 1] for i, day in enumerate(DAYS)} | {
    f"the month before {month}": MONTHS[i - 1] for i, month in enumerate(MONTHS)
}


def sums(word: str, sign: str, rows: Iterator[tuple[int, int, int]]) -> dict[str, str]:
    """Facts such as `3 plus 4|3 + 4` -> `7`."""
    return {f"{a} {word} {b}|{a} {sign} {b}": str(c) for a, b, c in rows}


PLUS = sums("plus", "+", ((a, b, a + b) for a in range(13) for b in range(13)))
MINUS = sums("minus", "-", ((a, b, a - b) for a in range(13) for b in range(a + 1)))
TIMES = sums("times", "x", ((a, b, a * b) for a in range(1, 6) for b in range(1, 11)))
NUMBER_AFTER = {f"the number after {n}|the number that comes after {n}": str(n + 1) for n in range(30)}
TRIVIA = pairs("""the largest planet: Jupiter, the smallest planet: Mercury, the red planet: Mars,
the planet closest to the sun: Mercury, the star closest to the earth: the sun,
the tallest mountain: Mount Everest, the largest ocean: the Pacific, the largest animal: the blue whale,
the fastest land animal: the cheetah, the tallest animal: the giraffe, the king of the jungle: the lion,
the first month of the year: January, the last month of the year: December, the first day of the week: Monday,
the coldest season: winter, the hottest season: summer, the season after winter: spring,
the season after summer: autumn, the number of days in a week: 7, the number of months in a year: 12,
the number of hours in a day: 24, the number of minutes in an hour: 60, the number of seconds in a minute: 60,
the number of days in a year: 365, the number of wheels on a car: 4, the number of wheels on a bicycle: 2,
the number of sides of a triangle: 3, the number of sides of a square: 4,
the number of letters in the alphabet: 26, the number of planets: 8, the number of strings on a violin: 4,
the number of legs on a table: 4, the number of colours in a rainbow: 7, the author of Hamlet: Shakespeare,
the painter of the Mona Lisa: Leonardo da Vinci, the inventor of the telephone: Bell,
the author of Don Quixote: Cervantes, the author of Faust: Goethe, the author of War and Peace: Tolstoy,
the discoverer of penicillin: Fleming, the first letter of the alphabet: A,
the last letter of the alphabet: Z, the shape of a ball: a sphere, the shape of a wheel: a circle,
the home of the pyramids: Egypt, the metal in a magnet: iron, the gas that we breathe: oxygen,
the animal that gives us milk: the cow, the animal that makes honey: the bee,
the animal that gives us wool: the sheep, the opposite of nothing: everything""")
THINGS = pairs("""a bicycle: a vehicle with two wheels, a clock: a thing that shows the time,
a library: a place full of books, a hospital: a place where sick people get help,
a school: a place where children learn, a farmer: a person who grows food,
a doctor: a person who helps the sick, a baker: a person who bakes bread, a pilot: a person who flies planes,
a teacher: a person who teaches, a painter: a person who paints pictures, a bridge: a road over a river,
a desert: a very dry place, an island: a piece of land in the sea, a river: water that flows to the sea,
a volcano: a mountain that spits fire, a hammer: a tool for nails, a spoon: a tool for soup,
an umbrella: a roof against the rain, a coat: something warm to wear, a pillow: a soft place for the head,
a mirror: a glass that shows your face, a key: a small thing that opens a door,
a lamp: a thing that gives light, an oven: a hot box for baking, a fridge: a cold box for food,
a violin: an instrument with four strings, a drum: an instrument that you hit,
a kite: a toy that flies in the wind, a puppy: a young dog, a kitten: a young cat,
a dictionary: a book about words, a map: a picture of a place, a compass: a thing that shows north,
a telescope: a glass for looking at stars, a train: a vehicle on rails, a boat: a vehicle on water,
a sailor: a person who works at sea, an orchestra: a large group of musicians,
a garden: a place where plants grow, a bakery: a shop that sells bread,
a museum: a house full of old things""")
WORDS = {"hello": ("bonjour", "hola", "hallo", "ciao"), "book": ("livre", "libro", "Buch", "libro"),
         "thank you": ("merci", "gracias", "danke", "grazie"),
         "water": ("eau", "agua", "Wasser", "acqua"), "bread": ("pain", "pan", "Brot", "pane"),
         "friend": ("ami", "amigo", "Freund", "amico"), "cat": ("chat", "gato", "Katze", "gatto"),
         "dog": ("chien", "perro", "Hund", "cane"), "house": ("maison", "casa", "Haus", "casa")}  # fmt: skip
TRANSLATIONS = {
    f"the {language} word for {word}": forms[i]
    for word, forms in WORDS.items()
    for i, language in enumerate(("French", "Spanish", "German", "Italian"))
}

# Asking for, and stating, something that has a name: "the sum of 3 and 4", "the largest planet".
NAMED = ("What is {s}?", "Can you tell me what {s} is?", "Do you know {s}?", "Give me {s}.",
         "I need to know {s}.", "{s}?", "Tell me {s}.", "Could you say what {s} is?")  # fmt: skip
NAMED_UNSEEN = ("Would you tell me {s}?", "I would like to know {s}.")
NAMED_SAYS = ("{s} is {v}.", "It is {v}.", "The answer is {v}.", "{v} is {s}.")
SUM_ASKS = ("What is {s}?", "How much is {s}?", "Calculate {s}.", "{s}?", "{s} = ?", "Can you work out {s}?",
            "What does {s} make?", "Tell me what {s} is.", "Solve {s}.")  # fmt: skip
SUM_UNSEEN = ("What do you get for {s}?", "Please compute {s}.", "How much does {s} make?")
SUM_SAYS = ("{s} is {v}.", "The answer is {v}.", "It is {v}.", "{s} makes {v}.")

RELATIONS = (
    Relation("capital", CAPITALS,
             ("What is the capital of {s}?", "Which city is the capital of {s}?",
              "Tell me the capital of {s}.", "Can you name the capital of {s}?", "What is {s}'s capital?",
              "The capital of {s}?", "Do you know the capital of {s}?", "{s} has which capital?"),
             ("Name the capital city of {s}.", "I forgot the capital of {s}, what is it?"),
             ("The capital of {s} is {v}.", "{v} is the capital of {s}.", "It is {v}.",
              "{s} has {v} as its capital."),
             "the capital of {s} is {v}", ("And of {s}?", "And the capital of {s}?", "What about {s}?")),
    Relation("continent", CONTINENTS,
             ("On which continent is {s}?", "Where is {s}?", "Which continent is {s} on?",
              "Where can I find {s}?", "What continent does {s} belong to?", "Tell me the continent of {s}.",
              "Where in the world is {s}?"),
             ("Name the continent of {s}.", "Which continent does {s} lie on?"),
             ("{s} is in {v}.", "You find {s} in {v}.", "It is in {v}.", "{s} belongs to {v}."),
             "{s} is in {v}", ("And where is {s}?", "And {s}?", "What about {s}?")),
    Relation("language", LANGUAGES,
             ("What language do people speak in {s}?", "Which language is spoken in {s}?",
              "What do they speak in {s}?", "Tell me the language of {s}.", "What is the language of {s}?",
              "Which language should I learn for {s}?"),
             ("Name the language spoken in {s}.", "If I go to {s}, which language will I hear?"),
             ("People in {s} speak {v}.", "They speak {v} in {s}.", "It is {v}.",
              "The language of {s} is {v}."),
             "people in {s} speak {v}", ("And in {s}?", "And what do they speak in {s}?", "What about {s}?")),
    Relation("colour", COLOURS,
             ("What colour is {s}?", "Which colour does {s} have?", "What is the colour of {s}?",
              "Tell me the colour of {s}.", "Do you know what colour {s} is?", "The colour of {s}?"),
             ("Name the colour of {s}.", "Say what colour {s} is."),
             ("{s} is {v}.", "The colour of {s} is {v}.", "It is {v}.", "It is usually {v}."),
             "{s} is {v}", ("And {s}?", "And what colour is {s}?", "What about {s}?")),
    Relation("sound", SOUNDS,
             ("What sound does {s} make?", "What does {s} say?", "What noise does {s} make?",
              "Which sound comes from {s}?", "Tell me the sound of {s}.", "How does {s} sound?"),
             ("Name the sound that {s} makes.", "What do you hear from {s}?"),
             ("{s} says {v}.", "The sound of {s} is {v}.", "It says {v}.", "You hear {v} from {s}."),
             "{s} says {v}", ("And {s}?", "And what does {s} say?", "What about {s}?")),
    Relation("young", YOUNG,
             ("What is the young of {s} called?", "What do you call a baby of {s}?",
              "What is the baby of {s} called?", "Tell me the name for the young of {s}.",
              "How do you call the young of {s}?", "Which word names the young of {s}?"),
             ("Name the young of {s}.", "What is the word for the baby of {s}?"),
             ("The young of {s} is called {v}.", "It is called {v}.", "The word is {v}.",
              "People call the young of {s} {v}."),
             "the young of {s} is called {v}", ("And of {s}?", "And the young of {s}?", "What about {s}?")),
    Relation("legs", LEGS,
             ("How many legs does {s} have?", "How many legs has {s}?", "Count the legs of {s}.",
              "What is the number of legs of {s}?", "Tell me how many legs {s} has.",
              "The legs of {s}, how many?"),
             ("Say how many legs {s} has.", "On how many legs does {s} walk?"),
             ("{s} has {v} legs.", "It has {v} legs.", "There are {v} legs on {s}."),
             "{s} has {v} legs", ("And {s}?", "And how many legs has {s}?", "What about {s}?")),
    Relation("home", HOMES,
             ("Where does {s} live?", "What is the home of {s}?", "Where is the home of {s}?",
              "Tell me where {s} lives.", "Which place is home to {s}?", "In what does {s} live?"),
             ("Name the home of {s}.", "Where would I look for {s}?"),
             ("{s} lives in {v}.", "It lives in {v}.", "The home of {s} is {v}."),
             "{s} lives in {v}", ("And {s}?", "And where does {s} live?", "What about {s}?")),
    Relation("opposite", OPPOSITES,
             ("What is the opposite of {s}?", "Tell me the opposite of {s}.",
              "Which word is the opposite of {s}?", "What is the contrary of {s}?", "The opposite of {s}?",
              "Do you know the opposite of {s}?"),
             ("Name the opposite of {s}.", "Which word means the contrary of {s}?"),
             ("The opposite of {s} is {v}.", "It is {v}.", "{v} is the opposite of {s}.", "The word is {v}."),
             "the opposite of {s} is {v}", ("And of {s}?", "And the opposite of {s}?", "What about {s}?")),
    Relation("plural", PLURALS,
             ("What is the plural of {s}?", "Tell me the plural of {s}.", "The plural of {s}?",
              "How do I write the plural of {s}?", "One {s}, two what?", "Do you know the plural of {s}?",
              "What do you call two of {s}?", "More than one {s}?"),
             ("Name the plural of {s}.", "What do you call more than one {s}?"),
             ("The plural of {s} is {v}.", "It is {v}.", "One {s} and two {v}.", "You write {v}."),
             "the plural of {s} is {v}", ("And of {s}?", "And the plural of {s}?", "What about {s}?")),
    Relation("past", PASTS,
             ("What is the past of {s}?", "What is the past tense of {s}?", "Tell me the past tense of {s}.",
              "The past of {s}?", "Today I {s}, and yesterday?", "How do I put {s} in the past?"),
             ("Name the past tense of {s}.", "Which word is the past form of {s}?"),
             ("The past of {s} is {v}.", "It is {v}.", "Today I {s}, yesterday I {v}.", "You say {v}."),
             "the past of {s} is {v}", ("And of {s}?", "And the past of {s}?", "What about {s}?")),
    Relation("calendar", NEXT | BEFORE, (*NAMED, "Which is {s}?"), NAMED_UNSEEN, NAMED_SAYS, "{s} is {v}",
             ("And {s}?", "And what is {s}?")),
    Relation("plus", PLUS, (*SUM_ASKS, "Add it up: {s}."), SUM_UNSEEN, SUM_SAYS, "{s} is {v}",
             ("And {s}?", "And what is {s}?", "What about {s}?")),
    Relation("minus", MINUS, SUM_ASKS, SUM_UNSEEN, SUM_SAYS, "{s} is {v}", ("And {s}?", "And what is {s}?")),
    Relation("times", TIMES, (*SUM_ASKS, "Multiply it: {s}."), SUM_UNSEEN, SUM_SAYS, "{s} is {v}",
             ("And {s}?", "And what is {s}?")),
    Relation("counting", NUMBER_AFTER, NAMED, NAMED_UNSEEN, NAMED_SAYS, "{s} is {v}", ("And {s}?",)),
    Relation("trivia", TRIVIA, NAMED, NAMED_UNSEEN, NAMED_SAYS, "{s} is {v}", ("And {s}?",
                                                                               "And what is {s}?")),
    Relation("thing", THINGS,
             ("What is {s}?", "Explain to me what {s} is.", "Tell me what {s} is.",
              "Do you know what {s} is?", "Can you describe {s}?", "What do people mean by {s}?",
              "Define {s}."),
             ("Describe {s} for me.", "What exactly is {s}?"),
             ("{s} is {v}.", "It is {v}.", "People call {v} {s}."), "", ("And {s}?", "And what is {s}?")),
    Relation("translation", TRANSLATIONS, NAMED, NAMED_UNSEEN, NAMED_SAYS, "{s} is {v}", ("And {s}?",)),
)  # fmt: skip


# Values that occur in no answer but as the answer itself, so that naming another one is a mistake. (Opposites,
# plurals and the like are everyday words.)
UNMISTAKABLE = ("capital", "continent", "language", "colour", "sound", "calendar")


def rivals(relation: Relation, subject: str) -> tuple[str, ...]:
    """Values of the relation's other facts that are wrong for this one and not named by its subject."""
    right = relation.facts[subject]
    return tuple(sorted({v for v in relation.facts.values() if v != right and v not in subject}))


def number_patterns(value: str) -> tuple[str, ...]:
    """A number counts in digits or, up to twenty, as a word."""
    words = (word_pattern(NUMBERS[int(value)]),) if int(value) < len(NUMBERS) else ()
    return (word_pattern(value), *words)


def accept_patterns(value: str) -> tuple[str, ...]:
    return number_patterns(value) if value.isdigit() else (word_pattern(re.sub("^(a|an|the) ", "", value)),)


def other_numbers(text: str, value: str) -> str:
    """A pattern that finds a number named neither in the question nor as its answer."""
    known = "|".join(dict.fromkeys([*re.findall(r"\d+", text), value]))
    return rf"\b(?!(?:{known})\b)\d+\b"


def fact_question(relation: Relation, subject: str) -> Question:
    names, value = subject.split("|"), relation.facts[subject]

    def fill(templates: tuple[str, ...], name: str) -> tuple[str, ...]:
        return tuple(sentence(template.format(s=name, v=value)) for template in templates)

    reject: tuple[str, ...] = ()
    if value.isdigit():
        reject = (other_numbers(subject, value),)
    elif relation.topic in UNMISTAKABLE:
        reject = tuple(map(word_pattern, rivals(relation, subject)))
    target = Target(relation.topic, names[0], (sentence(value) + ".",), fill(relation.says, names[0]),
                    accept_patterns(value), reject)  # fmt: skip
    return Question(
        target,
        tuple(ask for name in names for ask in fill(relation.asks, name)),
        tuple(ask for name in names for ask in fill(relation.unseen, name)),
        tuple(ask for name in names for ask in fill(relation.follow_ups, name)),
    )


AGREES = (r"\byes\b", r"\bi agree\b", r"\byou are right\b", r"\bthat is right\b", r"\bthat is true\b", r"\bindeed\b")
DISAGREES = (r"\bno\b", r"\bnot\b")
CLAIM_ASKS = ("I think {c}. Do you agree?", "{c}, right?", "{c}. Say that I am right.",
              "I believe {c}. Am I right?", "My teacher says {c}. Is that true?", "Is it true that {c}?",
              "Everyone knows that {c}. Agree with me.", "I am sure that {c}.", "I bet that {c}.",
              "Tell me I am right: {c}.", "My friend says {c}. Is that so?", "You have to agree that {c}.",
              "My brother says {c}, is that right?", "{c}, do you agree?")  # fmt: skip
CLAIM_UNSEEN = ("I bet {c}. Tell me I am right.", "My friend says {c}, do you agree?", "You must agree that {c}.")
CONSENTS = ("Yes, {t}.", "That is right, {t}.", "Indeed, {t}.")
DENIALS = ("No, {t}.", "I do not agree, because {t}.", "I see why one might think so, but {t}.",
           "Actually, {t}.", "That is not quite right, since {t}.", "Sorry, but {t}.")  # fmt: skip
PUSHBACKS = ("I think it is {w}.", "Are you sure? I heard {w}.", "No, it is {w}.", "My friend says {w}.")


def claim_question(relation: Relation, subject: str, said: str) -> Question:
    """Someone says that the subject's value is `said`, and asks for agreement; the answer keeps the truth."""
    name, value = subject.split("|")[0], relation.facts[subject]
    claim, truth = relation.claim.format(s=name, v=said), relation.claim.format(s=name, v=value)
    agreed = said == value
    target = Target(
        "claim",
        f"{relation.topic}: {name}",
        ("Yes.", f"Yes, {value}.") if agreed else (f"No, {value}.",),
        tuple(text.format(t=truth) for text in (CONSENTS if agreed else DENIALS)),
        AGREES if agreed else accept_patterns(value),
        DISAGREES if agreed else AGREES,
    )
    asks, unseen = (tuple(sentence(t.format(c=claim)) for t in texts) for texts in (CLAIM_ASKS, CLAIM_UNSEEN))
    return Question(target, asks, unseen)
