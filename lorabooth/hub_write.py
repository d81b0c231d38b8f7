"""The one place where a failure to write to the hub becomes a sentence."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from lorabooth.errors import UserError
from lorabooth.hub import NOT_THE_HUB, no_token

PAUSE_SECONDS = 2.0
"""Before a second attempt; then doubled."""


class Broken(UserError):
    """The hub did not answer, or not as it should: a later attempt may do."""


class Offline(Broken):
    """The hub is not to be asked: no attempt will do until the user changes that."""


@contextmanager
def writing(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError; Broken where trying again makes sense."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    again = "run the same command again; what has arrived is not sent twice"
    try:
        yield
    except HFValidationError:
        raise UserError(f"{repository!r} is not a name that a repository can have", hint="names look like owner/name") from None
    except OfflineModeIsEnabled:
        raise Offline("the hub is not asked, for HF_HUB_OFFLINE is set", hint="unset it, then run the same command again") from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub does not let this token write to {repository}, or has no such repository", hint="run: hf auth login") from None
    except HfHubHTTPError as error:
        raise _refused(repository, error.response.status_code, again) from None
    except UnicodeEncodeError:  # in the header that carries it
        raise no_token() from None
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):  # a page in place of the hub's JSON
        raise Broken("what answers is not the hub", hint=NOT_THE_HUB) from None
    except ValueError as error:  # what the hub finds wrong with the card, and what its storage says of a file
        raise UserError(f"the hub refuses what is pushed to {repository}: {' '.join(str(error).split())[:300]}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # the last two are how hf_xet, which carries large files where it is installed, fails
        raise Broken(f"the connection to the hub broke off ({type(error).__name__})", hint=again) from None


def _refused(repository: str, status: int, again: str) -> UserError:
    if status == 429 or status >= 500:
        return Broken(f"the hub is busy (HTTP {status})", hint=again)
    if status in (409, 412):
        return Broken(f"{repository} was changed by somebody else at the same time (HTTP {status})", hint=again)
    sentences = {
        401: ("the hub does not know this token", "make one that may write at https://huggingface.co/settings/tokens, then run: hf auth login"),
        403: (f"this token may not write to {repository}", "make one that may write at https://huggingface.co/settings/tokens, or push to a name of your own"),
        413: (f"the hub takes no file of this size in {repository}", "export a smaller LoRA: a lower rank, or bf16"),
    }
    sentence, hint = sentences.get(status, (f"the hub refused to write to {repository} (HTTP {status})", "see https://status.huggingface.co"))
    return UserError(sentence, hint=hint)
