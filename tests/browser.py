# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, controlled by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

# Debian's package and others' names for it.
PROGRAM = shutil.which('chromium') or shutil.which('chromium-browser')


class Browser:
    """One page of its own browser process, which ends with the context.

    Attributes:
        requests: addresses of all requests of the page.
    """

    def __init__(self, width: int = 1280, height: int = 900):
        """Starts it, with an empty profile."""
        assert PROGRAM is not None
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Chromium reads commands from file descriptor 3, and writes answers to 4.
        to_read, self._to = os.pipe()
        self._answers, to_write = os.pipe()
        flags = (
            '--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
            '--remote-debugging-pipe', '--no-first-run', '--disable-background-networking',
            '--disable-component-update', '--disable-dev-shm-usage',
            f'--user-data-dir={self._profile.name}',
        )  # fmt: skip
        # The shell puts each of them at its number, wherever it is now.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ['bash', '-c', script, 'bash', PROGRAM, *flags, 'about:blank'],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._count, self._session = b'', 0, ''
        targets = self._call('Target.getTargets')['targetInfos']
        [page] = [target for target in targets if target['type'] == 'page']
        attached = self._call('Target.attachToTarget', targetId=page['targetId'], flatten=True)
        self._session = attached['sessionId']
        for domain in ('Network', 'Page', 'Runtime'):
            self._call(f'{domain}.enable')
        self.resize(width, height)

    def __enter__(self) -> Browser:
        """Returns itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._answers)
        self._profile.cleanup()

    def open(self, url: str) -> None:
        """Goes to a page, and waits until it is there."""
        self._call('Page.navigate', url=url)
        self.wait_for(f'location.href.startsWith({json.dumps(url)})')
        self.wait_for("document.readyState === 'complete'")

    def resize(self, width: int, height: int) -> None:
        """Sets the size of the window, in pixels of CSS."""
        self._call(
            'Emulation.setDeviceMetricsOverride',
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def value(self, expression: str) -> Any:
        """Returns the value of an expression of JavaScript."""
        answer = self._call('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def wait_for(self, expression: str, secs: float = 30) -> None:
        """Returns as soon as an expression is true."""
        deadline = time.monotonic() + secs
        while True:
            try:
                if self.value(f'!!({expression})'):
                    return
            except AssertionError:  # The page is just being replaced.
                pass
            assert time.monotonic() < deadline, f'waited in vain for {expression}'
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Types a text into what has the focus."""
        for letter in text:
            self._call('Input.dispatchKeyEvent', type='keyDown', text=letter, key=letter)
            self._call('Input.dispatchKeyEvent', type='keyUp', key=letter)

    def screenshot(self, path: pathlib.Path) -> None:
        """Writes what the window shows to a PNG file."""
        answer = self._call('Page.captureScreenshot', format='png')
        path.write_bytes(base64.b64decode(answer['data']))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {'id': self._count, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._to, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._read_message()
            if answer.get('method') == 'Network.requestWillBeSent':
                self.requests.append(answer['params']['request']['url'])
            if answer.get('id') == self._count:
                assert 'error' not in answer, answer['error']
                return answer['result']

    def _read_message(self, secs: float = 60) -> dict[str, Any]:
        while b'\0' not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], secs)
            assert ready, f'the browser has not answered within {secs} s'
            read = os.read(self._answers, 1 << 20)
            assert read, 'the browser has ended'
            self._buffer += read
        message, self._buffer = self._buffer.split(b'\0', 1)
        return json.loads(message)
