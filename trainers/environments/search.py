"""A ready-made environment: questions on a small collection of texts, with tools to search it."""

import collections
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainers.environments import Answer, Environment, Example, Message
from trainers.environments.games import check_args, deal, text_of
from trainers.rewards.functions import answer_text
from utils.errors import DataError
from utils.fields import integer
from utils.files import InputFile, parse_json

# A longer reply may be a whole article, copied in the hope that the answer is in it.
_MAX_WORDS = 40


class Search(Environment):
    """Questions on a small collection of texts, and tools to search and to read it.

    The reward is 1 if the reply has at most 40 words and the answer among them, whatever the case,
    punctuation and articles.
    """

    def __init__(self, path: str, results: int = 3):
        """Reads the collection.

        Args:
            path: a folder with articles.jsonl, {"id", "title", "text"} per line, and
                questions.jsonl, {"question", "answer"}, which a run with `--data` does without. An
                answer may be a list of its spellings.
            results: titles per search.

        Raises:
            ConfigError: an argument is wrong.
            DataError: a file is missing, or a row is not as above.
        """
        check_args("search", results=(results, integer(1, 100)))
        self._questions, self._results = Path(path) / "questions.jsonl", results
        rows = _read_rows(Path(path) / "articles.jsonl", ("id", "title", "text"))
        self._articles = {str(row["id"]): row for row in rows}
        if len(self._articles) < len(rows):
            raise DataError(f"{path}/articles.jsonl: two articles have one id, expected unique ids")
        self._words = {
            name: collections.Counter(_words(f"{row['title']} {row['text']}"))
            for name, row in self._articles.items()
        }
        self._having = collections.Counter(w for words in self._words.values() for w in words)
        self._mean_length = sum(w.total() for w in self._words.values()) / len(self._words)
        self.tools = (self.search, self.read)

    def search(self, query: str) -> str:
        """Finds the articles that match a query best.

        Args:
            query: a few words.

        Returns:
            The id and the title of an article per line.
        """
        scores = {name: self._score(_words(query), words) for name, words in self._words.items()}
        best = sorted((name for name in scores if scores[name]), key=scores.get, reverse=True)
        found = [f"{name}: {self._articles[name]['title']}" for name in best[: self._results]]
        return "\n".join(found) or "nothing found"

    def _score(self, query: Iterable[str], words: collections.Counter) -> float:
        """BM25 with k1 = 1.2 and b = 0.75."""
        length = 0.25 + 0.75 * words.total() / self._mean_length
        score = 0.0
        for word in set(query) & words.keys():
            have = self._having[word] + 0.5
            rarity = math.log(1 + (len(self._words) - have + 1) / have)
            score += rarity * 2.2 * words[word] / (words[word] + 1.2 * length)
        return score

    def read(self, id: str) -> str:
        """Shows an article.

        Args:
            id: its id, as search shows it.

        Returns:
            The article's text.
        """
        if str(id) not in self._articles:
            raise ValueError(f"there is no article {str(id)!r:.80}; search shows the ids")
        return self._articles[str(id)]["text"]

    def examples(self, size: int, seed: int) -> Sequence[Example]:
        return deal(_read_rows(self._questions, ("question", "answer")), size, seed)

    def reset(self, example: Example) -> Sequence[Message]:
        given = example.get("answer")
        answers = [_words(str(a)) for a in (given if isinstance(given, list) else [given])]
        if given is None or not answers or not all(answers):
            raise DataError(f"answer is {given!r:.80}, expected a text or a list of texts")
        self._answers = [f" {' '.join(words)} " for words in answers]
        return [{"role": "user", "content": text_of(example, "question")}]

    def step(self, message: Message) -> Answer:
        words = _words(answer_text(message["content"]))
        found = any(answer in f" {' '.join(words)} " for answer in self._answers)
        return [], float(found and len(words) <= _MAX_WORDS), True


def _words(text: str) -> list[str]:
    """A text's words without case, punctuation and articles."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


def _read_rows(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a small JSON Lines file, each with all the keys."""
    file, rows = InputFile(path, DataError), []
    for number, line in enumerate(bytes(file.read(0, file.size)).splitlines(), 1):
        if line.strip():
            rows.append(row := parse_json(line, f"{path}:{number}", DataError))
            if not row.keys() >= set(keys):
                raise DataError(f"{path}:{number}: expected {', '.join(keys)}, got {sorted(row)}")
    if not rows:
        raise DataError(f"{path} has no rows, expected at least one")
    return rows
