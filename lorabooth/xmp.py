"""The XMP packet of a picture: the mark that a trained algorithm made it, and IPTC's fields on AI (Photo Metadata 2025.1)."""

import re
from xml.sax.saxutils import quoteattr

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED = SOURCE_TYPES + "trainedAlgorithmicMedia"
COMPOSITE = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
"""For a picture that was made from another one."""
FORBIDDEN = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot hold, not even escaped."""


def packet(prompt: str, negative_prompt: str, model: str, version: str, from_picture: bool) -> str:
    """The packet as text."""
    told = f"{prompt}\nNegative prompt: {negative_prompt}" if negative_prompt else prompt
    fields = {
        "Iptc4xmpExt:DigitalSourceType": COMPOSITE if from_picture else TRAINED,
        "Iptc4xmpExt:AISystemUsed": model,
        "Iptc4xmpExt:AIPromptInformation": told,
        "xmp:CreatorTool": f"lorabooth {version}",
    }
    attributes = " ".join(f"{name}={_attribute(value)}" for name, value in fields.items())
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f"{attributes}/></rdf:RDF></x:xmpmeta>"
    )


def _attribute(value: str) -> str:
    # A parser makes a space of a line break in an attribute, unless it is escaped.
    return quoteattr(FORBIDDEN.sub("\ufffd", value), {"\n": "&#10;", "\r": "&#13;", "\t": "&#9;"})
