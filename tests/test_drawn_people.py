"""The mini model's people, found and recognised by drawing."""

import random

import pytest
from PIL import Image, ImageDraw

from lorabooth.mini import finder, people, resemblance, world


def scene() -> Image.Image:
    """A landscape with nobody in it."""
    image = Image.new("RGB", (160, 112), "#8fb8de")
    draw = ImageDraw.Draw(image)
    draw.polygon([(0, 80), (50, 40), (110, 85), (160, 50), (160, 112), (0, 112)], fill="#6a8f5a")
    draw.rectangle((0, 95, 160, 112), fill="#777777")
    return image


def add(image: Image.Image, person: world.Person, left: int, top: int, size: int) -> None:
    """Draw a person into a picture."""
    avatar = world.avatar_image(tuple(sorted((a, v) for a, v in person.items() if a != "background")), size).crop((0, 0, size, size))
    image.paste(avatar, (left, top), avatar)


@pytest.mark.parametrize("name", list(people.HELD_OUT))
def test_the_identity_of_a_person_is_read_off_their_photos(name: str):
    assert resemblance.identity([photo.image() for photo in people.photos(name, "TOK")]) == people.HELD_OUT[name]


def test_a_person_in_another_scene_is_all_right_and_others_are_not():
    who = people.HELD_OUT["ada"]
    assert [resemblance.share_right(one.image(), who) for one in people.new_scenes("ada", "TOK", 3)] == [1.0] * 3
    assert max(resemblance.share_right(world.draw(world.sample_person(random.Random(i))), who) for i in range(4)) < 0.5
    glasses = world.draw(people.new_scenes("ada", "TOK", 1)[0].truth | {"glasses": "NONE"})
    assert resemblance.share_right(glasses, who) == 0.8


@pytest.mark.parametrize("size", [(144, 112), (96, 160)])
def test_a_portrait_lies_in_the_middle_at_the_bottom(size: tuple[int, int]):
    truth = people.new_scenes("bo", "TOK", 1)[0].truth
    assert resemblance.share_right(resemblance.portrait(world.draw(truth, *size)), people.HELD_OUT["bo"]) == 1.0


def test_drawn_people_are_found_where_they_are():
    image = scene()
    truth = {(20, 30, 48): people.photos("ada", "TOK")[0].truth, (95, 45, 40): people.photos("cy", "TOK")[1].truth}
    for place, person in truth.items():
        add(image, person, *place)
    found = finder.find(image)
    assert len(found) == 2
    for frame, (left, top, size) in zip(found, truth, strict=True):
        assert max(abs(frame.left - left), abs(frame.top - top), abs(frame.size - size)) < 0.08 * size


@pytest.mark.parametrize("picture", [scene(), Image.new("RGB", (128, 128), "#FFDBB4"), Image.new("RGB", (16, 16))], ids=["landscape", "skin", "tiny"])
def test_nobody_is_found_where_nobody_is(picture: Image.Image):
    assert finder.find(picture) == []


def test_a_portrait_is_found_whole():
    portrait = people.new_scenes("ada", "TOK", 1)[0].image()
    assert [frame.box for frame in finder.find(portrait)] == [(0, 0, 128, 128)]
