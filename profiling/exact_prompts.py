"""Prompts of an exact length in tokens, out of real sentences."""

from starling.engine.text.tokenizer import Tokenizer

SENTENCES = (
    "A lighthouse keeper counts the ships that pass in the night and writes their names into a heavy book.",
    "In the morning he walks down to the harbour, where the fishermen sell what they have caught.",
    "The price of a crate of mackerel was 14 shillings in 1911, and hardly more than that ten years later.",
    "Salt water slowly eats iron, so every bolt on the tower is replaced before it has served for eight winters.",
    "When fog covers the bay, a bell is struck every thirty seconds until the other shore can be seen again.",
    "His daughter studies mathematics in the city and sends long letters about numbers that nobody can compute.",
    "She explains that a proof is like a staircase: each step must carry the weight of all the ones above it.",
    "He answers with drawings of clouds, and with the exact hour at which the wind turned to the north.",
    "Travellers ask him why he stays, and he tells them that somebody has to keep the light burning.",
    "The lamp itself is small, but its lens was ground by hand from a single block of clear glass.",
    "Oil has to be carried up one hundred and sixty-two stairs, which takes a healthy man about four minutes.",
    "On Sundays the children of the village are allowed to climb up and look at the islands through a telescope.",
    "Some of them later became sailors, and one of them built a ship that crossed the ocean without a crew.",
    "Maps of the coast were poor in those days, and a captain who trusted them too much could lose his vessel.",
    "The keeper therefore marked every rock that he knew with red ink, and gave copies away for nothing.",
    "Storms come mostly in late autumn, when warm water meets the cold air that falls from the mountains.",
    "During the worst of them the waves reached the gallery, and the whole tower trembled like a plucked string.",
    "Afterwards the beach was covered with planks, ropes, broken barrels and a piano that still had all its keys.",
    "A museum in the capital has bought the book of ship names, and scholars read it to learn about old trade.",
    "What they find most useful are not the famous ships but the many plain ones that carried grain and coal.",
)


def prompt_tokens(tokenizer: Tokenizer, length: int, start: int) -> list[int]:
    """`length` token ids (BOS included where the checkpoint has one) of the text that begins at sentence `start`.

    Different starts give different prompts from the first word on, so that no runtime can reuse an earlier prefill.
    """
    rotation = start % len(SENTENCES)
    text = " ".join(SENTENCES[rotation:] + SENTENCES[:rotation])
    copies = 1
    while len(ids := tokenizer.encode(" ".join([text] * copies))) < length:
        copies *= 2
    return ids[:length]
