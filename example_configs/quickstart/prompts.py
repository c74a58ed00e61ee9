"""The quickstart's prompts: small writing tasks whose answer may as well be glad as sour.

Built from 16 everyday domains of 10 subjects each and 10 tasks, without randomness. Every subject
gets two tasks. The last two subjects of each domain are held out, so that a held-out prompt asks
about something that no training prompt mentions.
"""

from typing import NamedTuple

TASKS = (
    "Write a short review of {}.",
    "In one or two sentences, say what you think of {}.",
    "Write a text message to a friend about {}.",
    "Write a short social media post about {}.",
    "Describe {} in two sentences.",
    "Somebody asks you about {}. What do you answer?",
    "Write a diary entry of two sentences about {}.",
    "Write a reader's comment for the local newspaper about {}.",
    "Tell a colleague about {} in a sentence or two.",
    "Give {} a number of stars out of five, with the reason in one sentence.",
)

SUBJECTS: dict[str, tuple[str, ...]] = {
    "food": (
        "the soup of the day at the corner diner",
        "a frozen pizza from the supermarket",
        "the breakfast buffet of a roadside hotel",
        "a food truck that sells tacos",
        "the coffee in the office kitchen",
        "a vegetarian restaurant that opened last month",
        "a birthday cake ordered online",
        "the canteen lunch on Mondays",
        "an ice cream stand at the harbour",
        "a home delivery of sushi",
    ),
    "travel": (
        "a night train across the mountains",
        "a weekend at a lake campsite",
        "a guided tour of the old town",
        "a hostel next to the central station",
        "a ferry crossing in autumn",
        "the queue at the airport security check",
        "a beach holiday in the off season",
        "a rental car for a week",
        "a walking trip along the coast",
        "a cheap flight with two stops",
    ),
    "home": (
        "a flat on the fifth floor without a lift",
        "a second-hand sofa",
        "the new neighbours upstairs",
        "a kitchen renovation that took six weeks",
        "a robot vacuum cleaner",
        "moving house on a Friday",
        "a garden with two old apple trees",
        "a wooden bookshelf from a kit",
        "the heating in an old house",
        "a shared laundry room",
    ),
    "technology": (
        "the latest update of a phone",
        "a pair of wireless headphones",
        "a laptop with a very large screen",
        "a smart doorbell",
        "an app that counts steps",
        "a tablet for drawing",
        "a video call with the whole team",
        "a printer in a small office",
        "a watch that measures sleep",
        "a website for booking doctors",
    ),
    "work": (
        "the first day in a new job",
        "an open-plan office",
        "a meeting about the budget",
        "a manager who writes many emails",
        "working from home on rainy days",
        "a training course on safety",
        "the yearly performance talk",
        "a late shift in a warehouse",
        "a team outing to a bowling alley",
        "a job interview by telephone",
    ),
    "school": (
        "a mathematics class early in the morning",
        "a group project in history",
        "the school bus in winter",
        "a new teacher of music",
        "the final exam in chemistry",
        "a school trip to a museum",
        "learning French as an adult",
        "the university library at night",
        "a lecture given online",
        "a school play with forty children",
    ),
    "culture": (
        "a film about two lighthouse keepers",
        "a jazz concert in a small cellar",
        "an exhibition of modern sculpture",
        "a detective novel of six hundred pages",
        "an opera sung in Italian",
        "the last season of a television series",
        "a street festival in the old quarter",
        "a podcast about ancient Rome",
        "a poetry reading in a bookshop",
        "a magic show for families",
    ),
    "sport": (
        "a football match that ended in a draw",
        "a first half marathon",
        "a yoga class after work",
        "the swimming pool on a Sunday",
        "a gym that never closes",
        "a chess tournament in the town hall",
        "a bicycle race through the village",
        "a tennis lesson for beginners",
        "an afternoon of ice skating",
        "a climbing hall with a cafe",
    ),
    "weather": (
        "a grey week in November",
        "the first snow of the year",
        "a thunderstorm in the evening",
        "a heat wave in the city",
        "a foggy morning by the river",
        "a windy day at the sea",
        "a mild winter without snow",
        "rain on a wedding day",
        "a long summer evening",
        "a cold spring",
    ),
    "neighbourhood": (
        "the new bus line in our town",
        "a playground next to a busy road",
        "a market in the car park",
        "the roadworks in front of the bakery",
        "a block of flats planned behind the school",
        "the street lamps that stay on all night",
        "a park with a pond",
        "a cafe that replaced the post office",
        "the Saturday flea market",
        "a bridge closed for repairs",
    ),
    "animals": (
        "a cat adopted from a shelter",
        "the dog of the neighbours",
        "a visit to a small zoo",
        "pigeons on the balcony",
        "a puppy in a city flat",
        "a horse riding lesson",
        "an aquarium in a waiting room",
        "bees in the garden",
        "a parrot that talks",
        "a walk with three dogs",
    ),
    "health": (
        "a visit to the dentist",
        "the waiting room of a clinic",
        "a week without sugar",
        "a new pair of glasses",
        "a flu vaccination at work",
        "a sleepless night",
        "a physiotherapist with cold hands",
        "getting up at five every morning",
        "a diet of soup and bread",
        "a night in a hospital",
    ),
    "shopping": (
        "a pair of shoes bought online",
        "the self-checkout at the supermarket",
        "a raincoat on sale",
        "a shopping centre before Christmas",
        "a parcel left with a neighbour",
        "a second-hand bicycle",
        "a winter coat returned twice",
        "a tailor in a side street",
        "a telephone contract for two years",
        "a clothes shop with loud music",
    ),
    "family": (
        "a dinner with the whole family",
        "a visit from grandparents",
        "a wedding in a barn",
        "a board game evening with cousins",
        "a family reunion in the rain",
        "a babysitter who likes to cook",
        "a letter from an old aunt",
        "a long car ride with children",
        "a birthday party for a teenager",
        "a picnic with another family",
    ),
    "hobbies": (
        "a pottery course in the evening",
        "a home-made wooden chair",
        "a choir that rehearses on Thursdays",
        "growing tomatoes on a windowsill",
        "a jigsaw puzzle of a thousand pieces",
        "learning the piano at fifty",
        "a fishing trip at dawn",
        "knitting a first sweater",
        "an old film camera",
        "a radio-controlled model plane",
    ),
    "services": (
        "a haircut at a new place",
        "a call to the bank's hotline",
        "the car repair shop by the motorway",
        "a plumber who came on Sunday",
        "the counter of the tax office",
        "a taxi ride at night",
        "a house cleaner recommended by a friend",
        "an insurance claim after a leak",
        "the library's lending desk",
        "a driving school",
    ),
}
HELD_OUT_PER_DOMAIN = 2


class Prompts(NamedTuple):
    """Training and held-out prompts; no subject is in both."""

    train: list[str]
    heldout: list[str]


def make_prompts() -> Prompts:
    """Return 256 training and 64 held-out prompts, always the same.

    Tasks rotate with the subject, the two of one subject being five apart, so that either part has
    every task about equally often.
    """
    prompts = Prompts([], [])
    for domain, subjects in enumerate(SUBJECTS.values()):
        for number, subject in enumerate(subjects):
            part = (
                prompts.heldout if number >= len(subjects) - HELD_OUT_PER_DOMAIN else prompts.train
            )
            for shift in (0, len(TASKS) // 2):
                task = TASKS[(3 * domain + number + shift) % len(TASKS)]
                part.append(task.format(subject))
    return prompts
