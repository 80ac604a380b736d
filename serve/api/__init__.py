"""The outside: routes, socket, authentication, OpenAPI."""
