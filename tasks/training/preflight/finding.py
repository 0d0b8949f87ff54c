"""What a check of the preflight found: one value for each thing looked at, whether it is as it should be or not."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "noted", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check looked at.

    `check` is the check's name and `subject` what it looked at, such as a sample or a part of the model. `measured`
    and `wanted` are in words with units, `remedy` says what to change and is empty if `status` is ok. noted is what
    deserves a look but stops nothing.
    """

    check: str
    subject: str
    status: Status
    measured: str
    wanted: str
    remedy: str = ""

    @classmethod
    def judge(
        cls,
        check: str,
        subject: str,
        good: bool,
        *,
        measured: str,
        wanted: str,
        remedy: str,
        otherwise: Status = "failed",
    ) -> "Finding":
        """Return a finding that is ok if `good`, and else has the status `otherwise` and the remedy."""
        return cls(check, subject, "ok" if good else otherwise, measured, wanted, "" if good else remedy)

    def __str__(self) -> str:
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.check}: {self.subject}: {self.measured}; wanted: {self.wanted}.{remedy}"


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that stop a training."""
    return [finding for finding in findings if finding.status == "failed"]
