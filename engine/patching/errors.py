"""Every reason for which a patched vocabulary is refused, by name.

It checks nothing itself; artefact.py, artefact_files.py, invariants.py and upstream.py raise these. All are LoadErrors:
one line that names the file or id, what was found and what was expected.
"""

from __future__ import annotations

from engine.core.errors import LoadError


class ArtefactError(LoadError):
    """A patched vocabulary that cannot be used."""


class MissingFile(ArtefactError):
    """A file of the artefact is not there."""


class MalformedFile(ArtefactError):
    """Not JSON, a field absent or of another type, an array absent or of another shape."""


class TruncatedFile(ArtefactError):
    """The arrays' file is shorter or longer than patch.json says."""


class ArraysMismatch(ArtefactError):
    """The arrays' file is not the one that patch.json was written for."""


class UnknownVersion(ArtefactError):
    """A format version or a kind that this engine does not read."""


class BaseMismatch(ArtefactError):
    """The artefact belongs to another base tokenizer."""


class IdOutOfRange(ArtefactError):
    """An id outside its vocabulary."""


class IdCollision(ArtefactError):
    """Two tokens claim one new id."""


class IdsNotContiguous(ArtefactError):
    """The new ids are not 0..V-1."""


class KeptTokenUnmapped(ArtefactError):
    """A base token is neither removed nor has it a new id of its own; or it is both."""


class ConverterMismatch(ArtefactError):
    """The converter of a kept token is not that token alone."""


class MissingPiece(ArtefactError):
    """A piece that the base vocabulary does not have."""


class RemovedPart(ArtefactError):
    """A removed token decomposes into a token that is removed too."""


class CyclicDecomposition(RemovedPart):
    """A removed token decomposes, directly or through others, into itself."""


class DecompositionTooShort(ArtefactError):
    """A removed token decomposes into fewer than two parts."""


class DecompositionText(ArtefactError):
    """A removed token's parts do not spell it."""


class SpecialRemoved(ArtefactError):
    """A special token is removed or part of a decomposition."""


class SpecialInNgram(ArtefactError):
    """A special token inside an n-gram or its converter."""


class NgramTooShort(ArtefactError):
    """An n-gram of fewer than two pieces."""


class DuplicateNgram(ArtefactError):
    """The same pieces twice."""


class NgramText(ArtefactError):
    """An n-gram's converter does not spell what its pieces spell."""


class BadMerge(ArtefactError):
    """An appended merge that names a later token, or does not spell its n-gram."""


class WrongRows(ArtefactError):
    """A matrix has not one row for each new id."""


class UnsafePickle(ArtefactError):
    """A pickle that asks for anything but data."""


class PickleTooLarge(ArtefactError):
    """A pickle beyond the limits on bytes, opcodes or depth."""


class MalformedUpstream(ArtefactError):
    """An upstream directory whose pickles hold something other than a vocabulary."""
