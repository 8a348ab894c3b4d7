"""Who may call which route, as FastAPI dependencies: a route that names no caller needs none."""

from typing import Annotated

from fastapi import Depends

from deployments.callers import ANONYMOUS, Caller


async def _chat_caller() -> Caller:
    return ANONYMOUS


async def _admin_caller() -> Caller:
    return ANONYMOUS


ChatCaller = Annotated[Caller, Depends(_chat_caller)]
AdminCaller = Annotated[Caller, Depends(_admin_caller)]
