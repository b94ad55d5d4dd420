"""What can be set of the application: fields of a file for `serve deploy`, options of `octavo serve --replicas`."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from octavo.serve.limits import Limits
from octavo.units import parse_bytes


class Args(BaseModel, extra="forbid"):
    """What a replica serves, and how. Named as the options of `octavo serve` are; directories are such that every
    replica sees them."""

    llm: dict[str, Any] = Field(default_factory=dict)  # arguments of octavo.LLM: model, kv, calibration, …
    replicas: int = Field(1, ge=1)
    ingresses: int = Field(1, ge=1)  # processes that pass requests on
    cpus: float = Field(1, ge=0)  # of each replica
    gpus: float = Field(0, ge=0)
    served_model_name: list[str] = []
    api_key: list[str] = []  # by default what OCTAVO_API_KEY holds where a replica runs
    cors_origin: list[str] = []
    max_queue: int = Field(Limits.max_queue, ge=0)
    timeout: float = Field(Limits.timeout, gt=0)
    max_body: int = Field(Limits.max_body, ge=1)
    grace: float = Field(30.0, ge=0)
    session_dir: str | None = None
    session_dir_size: str = "10GiB"
    ignore_unknown_fields: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_requests: bool = True
    log_prompts: bool = False
    route: Literal["prefix", "random"] = "prefix"  # random: any two replicas are the choice, to compare with

    @property
    def session_dir_bytes(self) -> int:
        return parse_bytes(self.session_dir_size)
