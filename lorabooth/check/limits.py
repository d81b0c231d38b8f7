"""Where the check draws its lines. docs/photos.md lists them; `measured there` means the trials described on that page."""

WORK_PX = 512
"""Long side at which sharpness and light are measured: the figures of a photo then do not depend on the camera's resolution."""

# Sharpness: variance of the Laplacian (Pech-Pacheco and others, 2000, "Diatom autofocusing in brightfield microscopy") of luma stretched to
# 0-255. 100 is the usual line; measured there: 17 sharp photos have 643 or more, the same photos blurred over 0.4 % of their long side 45 or less.
SHARPNESS = 100.0
TILES = 8
SHARP_TILES = 6
"""Of the 8 x 8 tiles of a photo, the sixth sharpest counts: a portrait may have a blurred background, but not six sharp tiles of noise."""
FACE_WORK_PX = 48
"""Lower faces (at WORK_PX) say too little about sharpness; then the tiles count."""

# Exposure: luma, of 255, of the subject, which is the face where there is one, else the middle of the photo.
DARK = 60.0
"""Even the brightest twentieth is darker. Not the mean: a dark skin in good light has highlights far over this."""
BURNT_LUMA = 250
BURNT_FACE_SHARE = 0.25
"""Of a face that is pure white; skin has no detail there to learn."""
BURNT_MIDDLE_SHARE = 0.6
"""Without a face: white things on white are photographed on purpose."""
FLAT = 64.0
"""Luma between the darkest and the brightest hundredth: a quarter of the scale, as through fog or a dirty lens."""

# Faces, with the detector of lorabooth/check/faces.py.
FACE_SCORE = 0.8
"""Measured there: a face, also turned by 45 degrees, blurred, dark or 20 px high, scores 0.84 and more; dogs, cans and clocks 0.70 and less."""
FACE_PX = 64
"""Height of a face when trained on at the largest resolution: FLUX sees 16 px at a time, so these are four by four pieces."""
OTHER_FACE = 1 / 3
"""Of the main face's height; lower ones are passers-by in the background."""
PEOPLE_SHARE = 0.5
"""With a face in at least so many of the photos, they are of a person, and a photo without one is worth a word."""

# Duplicates: bits of a perceptual hash and mean difference of colours. Measured there: a photo saved anew, halved, or cut or shifted by 3 %
# differs in 8 bits or less and by 6 of 255; two photos of one dog, can or clock in 16 bits or more.
HASH_BITS = 8
HASH_COLOUR = 6.0

ENLARGED = 1.05
"""Less enlargement is not seen; `lorabooth train` draws the same line."""
ASPECT = 3.0
"""Of the training shapes (lorabooth.photos.Bucket): what is longer is cut."""

# The set. Shares are of the photos; fewer than SET_PHOTOS have no variety to speak of.
SET_PHOTOS = 6
ENOUGH = 10
"""Good photos for "ready"; 10-50 is what all trainers of likeness ask for."""
NEEDED = 4
"""Good photos without which nothing can be learned but the photos themselves."""
GOOD_SHARE = 0.8
SAME_FRAMING_SHARE = 0.9
CLOSE_UP = 0.4
HALF_BODY = 0.15
"""Height of the face in that of the photo: over CLOSE_UP it fills the photo, under HALF_BODY the whole body has room (a body is about 7.5 heads)."""
SAME_BACKGROUND_SHARE = 0.75
BACKGROUND_OVERLAP = 0.85
"""Common part of two histograms of the border's colours (Swain and Ballard 1991). Measured there: dogs and cans at other places reach 0.81."""
LIGHT_SPREAD = 8.0
"""Standard deviation of the photos' brightness, of 255. Measured there: five or six photos of one thing have 11 to 23."""
CAPTIONS = 4
"""Fewer captions have words in common by chance."""
