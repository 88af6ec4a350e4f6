"""What is known of every picture of people at work."""

SIZE = 64
"""Of a picture, in pixels."""

PROFESSIONS = (
    "artist", "astronaut", "construction worker", "cook", "detective", "factory worker", "farmer", "firefighter", "guard",
    "health worker", "judge", "mechanic", "office worker", "pilot", "police officer", "scientist", "singer", "student",
    "teacher", "technologist",
)  # fmt: skip
GENDERS = ("person", "man", "woman")
TONES = ("yellow", "light", "medium light", "medium", "medium dark", "dark")
STYLES = ("fluent", "noto", "twemoji")
ATTRIBUTES = {"profession": PROFESSIONS, "gender": GENDERS, "tone": TONES, "style": STYLES}
"""Attribute -> its values. Labels are ``[N, 4]`` indices in this order."""
