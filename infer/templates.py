"""Portrait templates: prompts that need nothing but a person. Knows no LoRA; `[who]` stands for the person."""

import difflib
from collections.abc import Sequence

from lorabooth.errors import UserError

WHO = "[who]"
ALL = "all"

# For FLUX: whole sentences on the setting, the clothes, the light and the lens, in that order; and none on the face, the
# hair or the age, which are the LoRA's to say.
FLUX = {
    "headshot": "A professional headshot of [who], wearing a navy blazer over a white shirt, in front of a plain light gray backdrop. Looking into the camera "
    "with a relaxed, friendly expression. Soft key light from one side with a gentle fill, 85 mm lens, sharp focus on the eyes.",
    "business": "A corporate portrait of [who] in a charcoal suit, standing with arms crossed in a modern glass office, a city skyline out of focus behind. "
    "Confident, slight smile. Cool daylight through tall windows, 50 mm lens, shallow depth of field.",
    "conference": "A photo of [who] giving a talk on the stage of a conference, wearing a smart jacket and a headset microphone, one hand raised in mid "
    "sentence. Large blurred screen behind, warm stage light on the face, blue light on the edges, 135 mm lens.",
    "studio-bw": "A black and white studio portrait of [who] in a dark turtleneck, against a black background. Calm, serious gaze into the camera. A single "
    "hard light from the left, deep shadows, fine film grain, 90 mm lens.",
    "cafe": "A candid photo of [who] sitting at the window of a small cafe, in a knitted sweater, both hands around a cup of coffee, looking up with a smile. "
    "Rain on the glass, warm lamps inside, soft daylight from the side, 35 mm lens.",
    "hiking": "A photo of [who] on a mountain trail, in a red rain jacket with a backpack, pausing to look over the valley. Pine slopes and distant snow "
    "peaks behind. Clear morning sun, crisp shadows, 35 mm lens, great depth of field.",
    "chef": "A photo of [who] as a chef, in a white double-breasted jacket and an apron, plating a dish at the pass of a restaurant kitchen. Steel, steam "
    "and copper pans behind. Warm overhead light, 50 mm lens, focus on the face.",
    "wedding-guest": "A photo of [who] as a guest at a garden wedding, in elegant festive clothes with a small flower pinned on, laughing, a glass in hand. "
    "String lights and guests out of focus behind. Golden evening light, 85 mm lens.",
    "astronaut": "A cinematic photo of [who] as an astronaut, in a white space suit with the visor up, inside a space station. The curve of the Earth shines "
    "through the round window behind. Blue light from the planet, small warm lamps, 40 mm lens.",
    "cyclist": "An action photo of [who] riding a road bike up a mountain pass, in a yellow jersey and a helmet, leaning into the bend with an intent look. "
    "Background streaked by motion. Bright side light, 70 mm lens, the face sharp.",
    "beach": "A photo of [who] walking along a wide beach at sunset, in a loose linen shirt, barefoot, hair moved by the wind. Low waves and wet sand that "
    "mirrors the sky. Warm backlight with a soft rim, 50 mm lens.",
    "winter": "A portrait of [who] outdoors in winter, in a dark wool coat with a thick scarf, snowflakes on the shoulders, breath visible in the cold. Snowy "
    "trees out of focus behind. Soft overcast light, 85 mm lens.",
    "reading": "A quiet photo of [who] reading in an old leather armchair, in a cardigan, a hardback book open on the lap. Tall bookshelves and a green desk "
    "lamp behind. Warm low light, 50 mm lens, gentle film look.",
    "street": "A street portrait of [who] at night in a big city, in a black leather jacket, standing still while people pass. Neon signs reflected in the "
    "wet road. Pink and blue light on the face, 35 mm lens at f/1.4.",
    "musician": "A photo of [who] playing an acoustic guitar on a small stage, in a denim shirt, eyes half closed. Amplifiers and a drum kit in the dark "
    "behind. One warm spotlight through thin haze, 85 mm lens.",
    "gardener": "A photo of [who] in a greenhouse full of tomato plants, in green overalls with rolled up sleeves, holding a wooden crate of vegetables and "
    "smiling. Diffuse light through the glass roof, 35 mm lens.",
    "scientist": "A photo of [who] in a laboratory, in a white coat and safety glasses pushed up on the forehead, examining a small glass flask. Instruments "
    "out of focus behind. Clean, even light with a blue tint, 50 mm lens.",
    "knight": "A cinematic portrait of [who] as a medieval knight, in worn steel armor with a dark green cloak, the helmet under one arm. A misty field with "
    "banners behind. Pale dawn light, 85 mm lens, muted colors.",
    "film-noir": "A still from a 1940s film noir with [who] as the detective, in a trench coat and a tie, at a desk behind half closed blinds. Black and "
    "white, stripes of light across the face, smoke in the air, 50 mm lens.",
    "oil-painting": "An oil painting of [who] in the manner of a Dutch master of the 17th century, in a dark velvet coat with a white lace collar. Plain brown "
    "background, light from a window on the left, visible brush strokes, fine cracks in the varnish.",
    "watercolor": "A loose watercolor portrait of [who] in a light summer shirt, head and shoulders, with soft washes of blue and ochre that run into the "
    "white paper. A few precise pencil lines around the eyes and the mouth.",
}

# For the mini model, whose prompts are sentences of lorabooth/mini/world.json.
MINI = {
    "headshot": "a portrait of [who] in a blazer over a white shirt, smiling, open eyes, on a gray background",
    "business": "a portrait of [who] in a suit with a navy tie, serious, open eyes, on a white background",
    "wedding-guest": "a portrait of [who] in a tuxedo with a white shirt, laughing, happy eyes, on a peach background",
    "chef": "a portrait of [who] in a white chef's suit, smirking, a wink, on a sky blue background",
    "cafe": "a portrait of [who] in a mint sweater with a collar, smiling, closed eyes, on a pale yellow background",
    "street": "a portrait of [who] in a black skull shirt, sticking out the tongue, rolling eyes, on a pink background",
    "gardener": "a portrait of [who] in blue overalls, laughing, open eyes, on a mint background",
    "cyclist": "a portrait of [who] in a pale yellow crew neck shirt, grimacing, wide eyes, on a sky blue background",
}


def templates_for(mini: bool) -> dict[str, str]:
    """Name -> prompt with `[who]` in it."""
    return MINI if mini else FLUX


def chosen(names: Sequence[str], mini: bool, who: str) -> list[str]:
    """The prompts of templates by name, each once, `all` for every one, with `who` in them; a UserError lists what there is."""
    known = templates_for(mini)
    for name in names:
        if name not in known and name != ALL:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"no template {name!r}{' for the mini model' if mini else ''}" + (f"; did you mean {near[0]}?" if near else ""),
                hint=f"there are: {', '.join(known)}, and {ALL} for all of them",
            )
    return [text.replace(WHO, who) for name, text in known.items() if ALL in names or name in names]


def listing() -> str:
    """All templates to read, with TOK as the person."""
    parts = []
    for title, mini in (("For FLUX.1 models", False), ("For --model mini", True)):
        width = max(map(len, templates_for(mini)))
        parts.append("\n".join([f"{title}:", *(f"  {name:{width}}  {text.replace(WHO, 'TOK')}" for name, text in templates_for(mini).items())]))
    return "\n\n".join(parts)
