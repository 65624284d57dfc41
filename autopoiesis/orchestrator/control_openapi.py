"""The control API's description for programs: OpenAPI 3.1, made of its routes."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from autopoiesis import __version__
from autopoiesis.orchestrator.control_contract import ErrorAnswer, Route

SCHEMAS = "#/components/schemas/{model}"


def openapi(routes: Iterable[Route]) -> dict[str, Any]:
    """Describe routes as an OpenAPI 3.1 document."""
    routes = tuple(routes)
    bodies = {(route.body, "validation") for route in routes if route.body}
    answers = {(route.answer, "serialization") for route in routes if route.answer}
    models = sorted(
        {*bodies, *answers, (ErrorAnswer, "serialization")}, key=lambda m: m[0].__name__
    )
    references, definitions = models_json_schema(models, ref_template=SCHEMAS)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        problem = _json("An error.", references[ErrorAnswer, "serialization"])
        operation: dict[str, Any] = {
            "operationId": route.name,
            "summary": route.summary,
            "responses": {"200": _done(route, references), "default": problem},
        }
        if route.also:
            operation["responses"][str(route.also)] = _done(route, references)
        if route.parameters:
            operation["parameters"] = [
                {
                    "name": name,
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "pattern": pattern},
                }
                for name, pattern in route.parameters
            ]
        if route.body:
            body = references[route.body, "validation"]
            operation["requestBody"] = {"required": route.body.model_json_schema().get("required") is not None,
                                        "content": {"application/json": {"schema": body}}}  # fmt: skip
        if route.changes:
            operation["security"] = [{"token": []}]
        paths.setdefault(route.path, {})[route.method] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Autopoiesis control API",
            "version": __version__,
            "description": "Health, arms, allocation, orders of an operator, SQL, metrics, and the live page.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer",
                          "description": "The content of `control-token` in the data directory."},
            },
        },
    }  # fmt: skip


def _done(route: Route, references: Mapping[Any, Any]) -> dict[str, Any]:
    if route.media == "application/json":
        answer = references[route.answer, "serialization"] if route.answer else {"type": "object"}
        return _json("Done.", answer)
    return {"description": "Done.", "content": {route.media: {"schema": {"type": "string"}}}}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
