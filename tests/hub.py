"""A small Hugging Face Hub server on 127.0.0.1, for tests with the real client."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import safetensors.torch
import timm
import torch

LFS = ('.safetensors', '.bin', '.pth')
TOKEN = 'hf_token'


def add_backbone(hub, name, seed=0):
    """Upload random weights of a small plain backbone to timm's repository; returns the backbone."""
    torch.manual_seed(seed)
    plain = timm.create_model(name.removesuffix('_mrla')).eval()
    for tensor in plain.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim < 2:
            tensor.add_(0.1 * torch.rand(tensor.shape))
    hub.commit(
        f'timm/{name.removesuffix("_mrla")}.r160_in1k',
        {'model.safetensors': safetensors.torch.save(plain.state_dict())},
    )
    return plain


class Hub:
    """Repositories in memory: `hub.repos[repo_id]` is a list of commits, each a dictionary of files.

    A revision is 'main', the last commit, or the number of a commit. Repositories in `gated` refuse access. For files
    in `truncated`, the server sends only the first half.
    """

    def __init__(self):
        self.repos = {}
        self.blobs = {}
        self.gated = set()
        self.truncated = set()
        self.requests = []
        self.servers = [ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Handler,), {'hub': self})) for _ in '12']
        self.url, self.cdn = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, repo_id, folder):
        """Commit the files of a folder."""
        self.commit(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()})

    def commit(self, repo_id, files):
        commits = self.repos.setdefault(repo_id, [{}])
        commits.append({**commits[-1], **files})

    def find(self, repo_id, revision):
        """The files of a revision, and its commit hash, by which the client caches them."""
        commits = self.repos[repo_id]
        number = len(commits) - 1 if revision == 'main' else int(revision[-4:])
        return commits[number], hashlib.sha1(repo_id.encode()).hexdigest()[:36] + f'{number:04}'


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *args):
        pass

    def reply(self, status, body=b'', **headers):
        if not isinstance(body, bytes):
            body, headers['Content_Type'] = json.dumps(body).encode(), 'application/json'
        self.send_response(status)
        for name, value in {'Content_Length': len(body), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.reply(status, {'error': message}, X_Error_Code=code, X_Error_Message=message)

    def read(self):
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def do_GET(self):
        self.hub.requests.append(f'{self.command} {self.path}')
        if match := re.fullmatch(r'/blob/(\w+)/(.+)', self.path):
            return self.send_blob(*match.groups())
        match = re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)', unquote(self.path))
        if not match:
            return self.refuse(404, 'EntryNotFound', f'{self.path} is beyond this stand-in')
        repo_id, revision, path = match.groups()
        if repo_id not in self.hub.repos:
            return self.refuse(404, 'RepoNotFound', 'Repository not found')
        if repo_id in self.hub.gated:
            return self.refuse(403, 'GatedRepo', f'Access to model {repo_id} is restricted')
        try:
            files, commit = self.hub.find(repo_id, revision)
        except (ValueError, IndexError):
            return self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        if path not in files:
            return self.refuse(404, 'EntryNotFound', 'Entry not found')
        oid = hashlib.sha256(files[path]).hexdigest()
        etag = f'"{oid}"'
        if not path.endswith(LFS):
            return self.reply(200, files[path], ETag=etag, X_Repo_Commit=commit)
        self.hub.blobs[oid] = files[path]
        linked = dict(X_Linked_ETag=etag, X_Linked_Size=len(files[path]))
        self.reply(302, Location=f'{self.hub.cdn}/blob/{oid}/{path}', X_Repo_Commit=commit, ETag='"pointer"', **linked)

    do_HEAD = do_GET

    def send_blob(self, oid, path):
        body = self.hub.blobs[oid]
        if match := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or ''):
            body = body[int(match[1]) :]
        if path in self.hub.truncated:
            body = body[: len(body) // 2]
        self.reply(206 if match else 200, body, ETag=f'"{oid}"')

    def do_PUT(self):
        self.hub.blobs[self.path.split('/')[2]] = self.read()
        self.reply(200)

    def do_POST(self):
        self.hub.requests.append(f'{self.command} {self.path}')
        body = self.read()
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.refuse(401, 'Unauthorized', 'Invalid username or password.')
        if self.path == '/api/validate-yaml':
            return self.reply(200, {'errors': [], 'warnings': []})
        if self.path == '/api/repos/create':
            new = json.loads(body)
            repo_id = f'{new["organization"]}/{new["name"]}'
            if repo_id in self.hub.repos:
                return self.reply(409, {'error': 'You already created this repo', 'url': f'{self.hub.url}/{repo_id}'})
            self.hub.repos[repo_id] = [{}]
            return self.reply(200, {'url': f'{self.hub.url}/{repo_id}'})
        if re.fullmatch(r'/[\w.-]+/[\w.-]+\.git/info/lfs/objects/batch', self.path):
            objects = json.loads(body)['objects']
            for item in objects:
                item['actions'] = {'upload': {'href': f'{self.hub.cdn}/blob/{item["oid"]}'}}
            return self.reply(200, {'transfer': 'basic', 'objects': objects})
        repo_id, action = re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main', self.path).groups()
        if action == 'preupload':
            files = [file['path'] for file in json.loads(body)['files']]
            modes = {path: 'lfs' if path.endswith(LFS) else 'regular' for path in files}
            files = [{'path': path, 'uploadMode': mode, 'shouldIgnore': False} for path, mode in modes.items()]
            return self.reply(200, {'files': files})
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.hub.blobs[value['oid']]
        self.hub.commit(repo_id, files)
        commit = self.hub.find(repo_id, 'main')[1]
        self.reply(200, {'commitUrl': f'{self.hub.url}/{repo_id}/commit/{commit}', 'commitOid': commit})
