"""Text from token ids, one by one."""

import codecs
from collections.abc import Callable, Set


class StreamDecoder:
    """Decodes id by id and holds back the bytes of an unfinished character."""

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: Set[int], strip: bool):
        """
        Args:
            token_bytes: the bytes of an id.
            hidden: ids that have no text.
            strip: take away a space that the text starts with.
        """
        self._token_bytes, self._hidden, self._strip = token_bytes, hidden, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain now. Raises SamplingError for an id outside the vocabulary."""
        data = self._token_bytes(token_id)
        if token_id in self._hidden:
            return ""
        if self._strip:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest: U+FFFD for a character that never ended, else nothing."""
        return self._utf8.decode(b"", final=True)
