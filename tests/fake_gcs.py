"""Buckets in memory behind the JSON API of Google Cloud Storage, for tests without a network.

What gcsfs, TensorStore and google-cloud-storage ask of it and no more: objects are inserted (in one request, as a
multipart, or resumably), read (whole or in ranges), described, listed (prefix, delimiter, pages) and deleted, with
preconditions on their generation. There are no folders, no permissions and no copies: a client that asks for anything
else is answered 501, which a test sees in `unknown`.
"""

import base64
import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PAGE = 7  # names to a page of a listing: that lists have pages is part of the test


class Object(NamedTuple):
    data: bytes
    generation: int


class FakeGCS:
    """A server on a free port of this machine: `with FakeGCS() as gcs:`."""

    def __init__(self, *buckets: str):
        self.buckets = buckets
        self.objects: dict[str, Object] = {}  # by BUCKET/NAME
        self.changes: list[tuple[str, Object | None]] = []  # in their order; None: deleted
        self.unknown: list[str] = []
        self.refuse = None  # (method, address) -> whether such a request is refused, 403
        self.lock = threading.RLock()
        self.uploads: dict[str, tuple[str, bytes]] = {}  # resumable ones that are under way
        self._generation = 0

        class Handler(_Handler):
            store = self

        self._server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which clients find it."""
        return {
            'STORAGE_EMULATOR_HOST': self.url,  # read by gcsfs and google-cloud-storage
            'TENSORSTORE_GCS_HTTP_URL': self.url,
            'NO_GCE_CHECK': 'true',  # gcsfs: no credentials of the machine
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it would ask by gRPC what kind of bucket this is
        }

    def put(self, name: str, data: bytes) -> Object:
        with self.lock:
            self._generation += 1
            self.objects[name] = Object(data, self._generation)
            self.changes.append((name, self.objects[name]))
            return self.objects[name]

    def delete(self, name: str) -> None:
        with self.lock:
            del self.objects[name]
            self.changes.append((name, None))

    def names(self, prefix: str = '') -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet
    store: FakeGCS

    def handle(self):
        with contextlib.suppress(ConnectionError):  # gcsfs asks two questions at once and hangs up after one answer
            super().handle()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer('GET')

    def do_POST(self):
        self._answer('POST')

    def do_PUT(self):
        self._answer('PUT')

    def do_DELETE(self):
        self._answer('DELETE')

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.body = self._read_body()
        store = self.store
        asked = re.fullmatch(r'(/upload|/download)?/storage/v1/b/([^/]+)(/o)?/?([^/]+)?', url.path)
        resumed = re.fullmatch(r'/resumable/(\d+)', url.path)
        way, bucket, objects, name = asked.groups() if asked else (None,) * 4
        with store.lock:
            if store.refuse is not None and store.refuse(method, unquote(self.path)):
                self._json(403, _error(403, 'Forbidden'))
            elif method in ('POST', 'PUT') and resumed:
                self._go_on(resumed[1])
            elif asked and bucket not in store.buckets:
                self._json(404, _error(404, 'The specified bucket does not exist.'))
            elif method in ('GET', 'DELETE') and name:
                self._one(method, f'{bucket}/{unquote(name)}')
            elif method == 'POST' and way == '/upload':
                self._insert(bucket)
            elif method == 'GET' and objects:
                self._list(bucket)
            elif method == 'GET' and bucket:
                self._json(200, {'kind': 'storage#bucket', 'name': bucket, 'id': bucket})
            else:
                store.unknown.append(f'{method} {self.path}')
                self._json(501, _error(501, 'not part of this fake'))

    def _read_body(self) -> bytes:
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _one(self, method: str, name: str) -> None:
        found = self.store.objects.get(name)
        if found is None:
            return self._json(404, _error(404, f'No such object: {name}'))
        if self.query.get('ifGenerationMatch', str(found.generation)) != str(found.generation):
            return self._json(412, _error(412, 'conditionNotMet'))
        if self.query.get('ifGenerationNotMatch') == str(found.generation):
            return self._send(304, b'', {})
        if method == 'DELETE':
            self.store.delete(name)
            return self._send(204, b'', {})
        if self.query.get('alt') != 'media':
            return self._json(200, _metadata(name, found))
        return self._media(found)

    def _media(self, found: Object) -> None:
        wanted, size = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')), len(found.data)
        headers = {'x-goog-generation': str(found.generation), 'x-goog-hash': f'crc32c={_crc32c(found.data)}'}
        if wanted is None:
            return self._send(200, found.data, headers)
        first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first >= size:
            return self._send(416, b'', {'Content-Range': f'bytes */{size}'})
        headers['Content-Range'] = f'bytes {first}-{last}/{size}'
        return self._send(206, found.data[first : last + 1], headers)

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter', '')
        start, end = self.query.get('startOffset', ''), self.query.get('endOffset', '')
        after, size = self.query.get('pageToken', ''), min(int(self.query.get('maxResults', PAGE)), PAGE)
        entries = {}  # what is shown -> the object, or None for a prefix
        for name, found in sorted(self.store.objects.items()):
            name = name.removeprefix(f'{bucket}/') if name.startswith(f'{bucket}/') else None
            if name is None or not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            head, there, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, '', '')
            entries[prefix + head + there if there else name] = None if there else found
        shown = [name for name in sorted(entries) if name > after]
        page, rest = shown[:size], shown[size:]
        answer = {
            'kind': 'storage#objects',
            'items': [_metadata(f'{bucket}/{name}', entries[name]) for name in page if entries[name] is not None],
            'prefixes': [name for name in page if entries[name] is None],
        }
        self._json(200, answer | ({'nextPageToken': page[-1]} if rest else {}))

    def _insert(self, bucket: str) -> None:
        name, kind = self.query.get('name', ''), self.query.get('uploadType', 'media')
        if kind == 'resumable':
            name = name or json.loads(self.body)['name']
            number = str(len(self.store.uploads))
            self.store.uploads[number] = (f'{bucket}/{name}', b'')
            return self._send(200, b'', {'Location': f'{self.store.url}/resumable/{number}'})
        data = self.body
        if kind == 'multipart':
            about, data = _parts(self.body, self.headers['Content-Type'])
            name = name or json.loads(about)['name']
        there = self.store.objects.get(f'{bucket}/{name}')
        if self.query.get('ifGenerationMatch', str(there.generation if there else 0)) != (
            str(there.generation) if there else '0'
        ):
            return self._json(412, _error(412, 'conditionNotMet'))
        return self._json(200, _metadata(f'{bucket}/{name}', self.store.put(f'{bucket}/{name}', data)))

    def _go_on(self, number: str) -> None:
        name, data = self.store.uploads[number]
        data += self.body
        self.store.uploads[number] = name, data
        if self.headers.get('Content-Range', '*/*').endswith('/*'):
            return self._send(308, b'', {'Range': f'bytes=0-{len(data) - 1}'})
        return self._json(200, _metadata(name, self.store.put(name, data)))

    def _json(self, status: int, value: dict) -> None:
        self._send(status, json.dumps(value).encode(), {'Content-Type': 'application/json; charset=UTF-8'})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


def _parts(body: bytes, content_type: str) -> tuple[bytes, bytes]:
    """(description, data) of a multipart/related body."""
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)[1].encode()
    _, about, data, _ = body.split(b'--' + boundary)
    about, data = (re.split(rb'\r?\n\r?\n', part, maxsplit=1)[1] for part in (about, data))
    return about, data[:-2] if data.endswith(b'\r\n') else data[:-1]


def _metadata(name: str, found: Object) -> dict:
    bucket, _, name = name.partition('/')
    time = '2026-01-01T00:00:00.000Z'
    return {
        'kind': 'storage#object',
        'bucket': bucket,
        'name': name,
        'size': str(len(found.data)),
        'generation': str(found.generation),
        'metageneration': '1',
        'crc32c': _crc32c(found.data),
        'timeCreated': time,
        'updated': time,
        'storageClass': 'STANDARD',
        'contentType': 'application/octet-stream',
    }


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _error(code: int, message: str) -> dict:
    return {'error': {'code': code, 'message': message, 'errors': [{'message': message, 'reason': message}]}}
