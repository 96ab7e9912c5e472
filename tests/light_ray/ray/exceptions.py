"""The errors that our side tells apart."""


class RayError(Exception): ...


class TaskUnschedulableError(RayError): ...


class NodeDiedError(RayError): ...


GetTimeoutError = TimeoutError
