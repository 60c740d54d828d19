"""A server-first TCP echo: greets with `<name> sees <client address>`, then echoes until the
client's end of file, says `bye` and closes: half-close is visible.

Run as `python -m agent.cli.demo.echo NAME PORT`.
"""

import asyncio
import sys


async def main(name: str, port: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")[0].removeprefix("::ffff:")
        writer.write(f"{name} sees {peer}\n".encode())
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.write(b"bye\n")
            await writer.drain()
        except OSError:
            pass  # the client went away: nobody is left to tell
        finally:
            writer.close()

    server = await asyncio.start_server(serve, None, port, backlog=1024)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
