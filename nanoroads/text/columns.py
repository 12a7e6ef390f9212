"""What a file of rows holds beside what is read, in lines for its user.

Nothing here is used in training. A column that nobody reads may be what its owner counts on: a system
prompt, a margin, or scores that say that both answers are equally good."""

from collections import Counter

from nanoroads.text.layouts import BAD_LABELS, GOOD_LABELS

# A column of numbers of these kinds for the chosen answer has a counterpart for the rejected one.
SCORES = ("score", "rating", "reward")
MOST_NAMES = 12  # of columns that are named in one line


class Columns:
    """Counts over the rows of a file, for `lines`."""

    def __init__(self):
        self.rows = 0
        self.unread = Counter()  # name -> rows that have it
        self.equal = Counter()  # column of scores -> rows in which both answers have the same
        self.inverted = Counter()  # column of scores -> rows in which the rejected answer has more
        self.small_margins = Counter()  # column of margins -> rows in which it is 0 or less
        self.bad_labels = 0  # rows with one answer, and label false
        self.other_labels = 0  # those whose label is neither true nor false, but a class, say
        self.repeated_prompts = 0  # rows in which each answer begins with the prompt

    def add(self, row, texts):
        """Count a row (dict) and what was read of it (layouts.Texts)."""
        self.rows += 1
        for name in row:
            if name not in texts.fields:
                self.unread[name] += 1
        self.add_scores(row)
        if "label" in row and len(texts.answers) == 1:
            if row["label"] in BAD_LABELS:
                self.bad_labels += 1
            elif row["label"] not in GOOD_LABELS:
                self.other_labels += 1
        if isinstance(texts.prompt, str) and texts.answers:
            if all(answer.startswith(texts.prompt) for answer in texts.answers):
                self.repeated_prompts += 1

    def add_scores(self, row):
        """Count what a row says about how much better its chosen answer is."""
        for name in row:
            counterpart = name.replace("chosen", "rejected")
            is_score = any(kind in name for kind in SCORES) and counterpart != name
            if is_score and is_number(row[name]) and is_number(row.get(counterpart)):
                if row[name] == row[counterpart]:
                    self.equal[name] += 1
                elif row[name] < row[counterpart]:
                    self.inverted[name] += 1
            if "margin" in name and is_number(row[name]) and row[name] <= 0:
                self.small_margins[name] += 1

    def lines(self):
        """The counts as lines."""
        return self.unread_lines() + self.finding_lines()

    def unread_lines(self):
        """The columns that nobody reads, in one line or none."""
        if not self.unread:
            return []
        names = list(self.unread)[:MOST_NAMES]
        if len(self.unread) > MOST_NAMES:
            names.append(f"and {len(self.unread) - MOST_NAMES} more")
        return [f"columns not read: {', '.join(names)}"]

    def finding_lines(self):
        """What speaks against training some of the rows as they are."""
        lines = []
        of_rows = f"of {self.rows:,} rows"
        for name in self.equal | self.inverted:
            counterpart = name.replace("chosen", "rejected")
            counts = f"equal in {self.equal[name]:,}, inverted in {self.inverted[name]:,} {of_rows}"
            lines.append(f"{name} and {counterpart}: {counts}")
        for name, count in self.small_margins.items():
            lines.append(f"{name}: 0 or less in {count:,} {of_rows}")
        if self.bad_labels and not self.other_labels:
            marked = f"answers marked as bad (false) in {self.bad_labels:,} {of_rows}"
            lines.append(f"label: {marked}; such rows (KTO) are trained as good answers")
        if self.repeated_prompts:
            counts = f"{self.repeated_prompts:,} {of_rows}"
            lines.append(f"answers begin with the whole prompt in {counts}; it stands there twice")
        return lines


def is_number(value):
    """Whether a value is a number, not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
