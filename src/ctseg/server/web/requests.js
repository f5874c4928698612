/** Requests to the server this page came from. */

const TOKEN = 'ctseg-token';
const PRINTABLE = /^[ -~]+$/; // others cannot be sent in a header
let asking = null;

/** What the server, or the lack of one, has to say; `status` is 0 where it did not answer. */
export class ApiError extends Error {
  constructor(message, status, path) {
    super(message);
    this.status = status;
    this.path = path;
  }
}

/** The answer's JSON; null where it has none. */
export async function json(method, path, body) {
  const response = await send(method, path, body);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** The answer's bytes. */
export async function bytes(method, path, body) {
  return (await send(method, path, body)).arrayBuffer();
}

/** Ends a session without waiting, also while the page is left. */
export function forget(path) {
  fetch(path, { method: 'DELETE', headers: headers(), keepalive: true }).catch(() => {});
}

async function send(method, path, body) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN);
    const response = await answer(method, path, body);
    if (response.ok) return response;
    if (response.status !== 401) throw new ApiError(await reason(response), response.status, path);
    // Another request may have asked in the meantime.
    if (token === sessionStorage.getItem(TOKEN)) await askToken(token === null ? 'This server asks for a token' : 'That token is not the right one');
  }
}

async function answer(method, path, body) {
  const isForm = body instanceof FormData;
  const type = body && !isForm ? { 'Content-Type': 'application/json' } : {};
  const content = body && !isForm ? JSON.stringify(body) : body;
  try {
    return await fetch(path, { method, headers: { ...headers(), ...type }, body: content });
  } catch {
    throw new ApiError('The server does not answer. Is ctseg serve still running?', 0, path);
  }
}

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function reason(response) {
  const text = await response.text();
  try {
    const { detail, error, message } = JSON.parse(text);
    const told = detail ?? error ?? message;
    if (Array.isArray(told)) return told.map((problem) => problem.msg).join('; ');
    if (told) return String(told);
  } catch {
    // Not JSON: the status has to do.
  }
  return `The server answered ${response.status} ${response.statusText}`.trim();
}

/** Asks once, however many requests wait for it. */
function askToken(text) {
  asking ??= showTokenDialog(text).finally(() => { asking = null; });
  return asking;
}

function showTokenDialog(text) {
  const dialog = document.getElementById('token-dialog');
  const field = document.getElementById('token');
  document.getElementById('token-title').textContent = text;
  field.value = '';
  dialog.returnValue = '';
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.addEventListener('close', () => {
      const token = field.value.trim();
      field.value = '';
      if (dialog.returnValue !== 'ok') return reject(new ApiError('Nothing can be done here without the token.', 401, ''));
      if (!PRINTABLE.test(token)) return resolve(showTokenDialog('A token has only plain letters, digits and signs (ASCII)'));
      sessionStorage.setItem(TOKEN, token);
      return resolve();
    }, { once: true });
  });
}
