"""Readiness in the words of facts ztunnel 11.5."""

from aiohttp import web

from agent.report import Report


def readiness_app(report: Report) -> web.Application:
    async def ready(request: web.Request) -> web.Response:
        pending = report.pending()
        if not pending:
            return web.Response(text="ready\n")
        return web.Response(status=500, text=f"not ready, pending: {', '.join(pending)}\n")

    app = web.Application()
    # Another method answers 405 by itself.
    app.router.add_get("/healthz/ready", ready)
    return app
