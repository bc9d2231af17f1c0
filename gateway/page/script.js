'use strict';
/* The page of a gateway: a chat and a view of the cluster. One file, no library, no request but to the gateway it came
 * from. Text of the model and of the cluster gets into the page as text only. */

const $ = id => document.getElementById(id);
const sleep = ms => new Promise(done => setTimeout(done, ms));

/** make('p.hint', 'text', child, ...): an element with classes and children. */
function make(what, ...children) {
  const [tag, ...classes] = what.split('.');
  const element = document.createElement(tag);
  element.className = classes.join(' ');
  element.append(...children);
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function api(path, options = {}) {
  const headers = {...options.headers};
  if ($('key').value) headers.Authorization = `Bearer ${$('key').value}`;
  return fetch(path, {...options, headers});
}

/** An answer of the server that says no: asking again by ourselves would not help. */
class Refused extends Error {}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  return new Refused(body.error?.message ?? `the server answered ${response.status}`);
}

/* ---- the server in the header ---- */

let model = 'default';

function showServer(kind, text) {
  $('server').className = `pill ${kind}`;
  $('server').textContent = text;
}

/** The cluster's summary; null when there is none, and the header says why. */
async function fetchCluster() {
  try {
    const response = await api('/v1/cluster');
    if (response.status === 401) {
      showServer('busy', 'needs an API key: Settings');
      return null;
    }
    if (!response.ok) throw await refusal(response);
    const cluster = await response.json();
    model = cluster.model;
    showServer(cluster.ready ? 'good' : 'busy', cluster.ready ? model : `${model}: ${cluster.reason}`);
    return cluster;
  } catch (error) {
    showServer('bad', 'gateway not reachable');
    return null;
  }
}

/* ---- events of a stream ---- */

/** {id, data} of each server-sent event; ends with the connection. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (text + value).split('\n\n');
    text = parts.pop();
    for (const part of parts) {
      const event = {id: '', data: ''};
      for (const line of part.split('\n')) {
        if (line.startsWith('id: ')) event.id = line.slice(4);
        if (line.startsWith('data: ')) event.data += line.slice(6);
      }
      if (event.data) yield event;
    }
  }
}

/** One answer, over as many connections as it takes: a broken one is gone on with after the last event that came. */
class Answer {
  constructor(body) {
    this.body = JSON.stringify({...body, stream: true, stream_options: {include_usage: true, resumable: true}});
    this.name = Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, '0')).join('');
    this.id = '';
    this.last = '';
    this.stopped = false;
    this.abort = new AbortController();
  }

  /** The server frees what it holds, not only this connection. Before it has told the answer's id, it knows the request's. */
  stop() {
    if (this.stopped) return;
    this.stopped = true;
    const end = () => this.abort.abort(); // not before: a stream whose connection is gone waits for us to come back
    api(`/v1/streams/${encodeURIComponent(this.id || this.name)}`, {method: 'DELETE', keepalive: true}).then(end, end);
  }

  connect() {
    const signal = this.abort.signal;
    if (this.last) {
      return api(`/v1/streams/${encodeURIComponent(this.id)}`, {headers: {'Last-Event-ID': this.last}, signal});
    }
    return api('/v1/chat/completions', {method: 'POST', body: this.body, headers: {'Content-Type': 'application/json', 'X-Request-Id': this.name}, signal});
  }

  /** true: the answer is complete; false: the connection broke. */
  async read(onChunk) {
    const response = await this.connect();
    if (!response.ok && this.last && response.status >= 500) return false;
    if (!response.ok) throw await refusal(response);
    for await (const event of events(response.body)) {
      if (event.data === '[DONE]') return true;
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new Refused(chunk.error.message);
      this.id = chunk.id;
      this.last = event.id || this.last;
      this.tries = 0;
      onChunk(chunk);
    }
    return this.stopped;
  }

  async run(onChunk, onPause) {
    const MAX_TRIES = 12; // with the waits between them more than half a minute: longer the server keeps no stream
    for (this.tries = 0; this.tries < MAX_TRIES; this.tries++) {
      try {
        if (await this.read(onChunk)) return;
      } catch (error) {
        if (this.stopped) return;
        if (error instanceof Refused || !this.last) throw error;
      }
      if (!this.last) break;
      onPause();
      await sleep(Math.min(200 * 2 ** this.tries, 4000));
    }
    throw new Error('the connection was lost');
  }
}

/* ---- an answer on the page ---- */

/** Fenced code apart from text: [{code, lang, text}]. */
function blocks(text) {
  const parts = [];
  text.split(/^```/m).forEach((part, i) => {
    if (i % 2 === 0) {
      if (part.trim()) parts.push({code: false, lang: '', text: part.replace(/^\n+|\n+$/g, '')});
    } else {
      const end = part.indexOf('\n');
      parts.push({code: true, lang: end < 0 ? part : part.slice(0, end), text: end < 0 ? '' : part.slice(end + 1)});
    }
  });
  return parts;
}

function renderBlock(block) {
  if (block.code) {
    return make('pre', ...(block.lang ? [make('span.lang', block.lang)] : []), make('code', block.text));
  }
  const element = make('div.text');
  block.text.split(/`([^`\n]+)`/).forEach((part, i) => element.append(i % 2 ? make('code', part) : part));
  return element;
}

const MIN_RATE_MS = 50; // what came all at once had no speed

class AnswerView {
  constructor() {
    this.began = performance.now();
    this.reasoning = this.content = '';
    this.calls = [];
    this.usage = null;
    this.finish = '';
    this.shown = []; // blocks in the page
    this.thinking = make('details.thinking', make('summary', 'Thinking …'), make('div.text'));
    this.thinking.open = true;
    this.thinking.hidden = true;
    this.text = make('div.content');
    this.boxes = make('div');
    this.meta = make('div.meta');
    this.element = make('article.answer.waiting', this.thinking, this.text, this.boxes, this.meta);
  }

  take(chunk) {
    const choice = chunk.choices[0];
    this.usage = chunk.usage ?? this.usage;
    this.meta.textContent = '';
    if (!choice) return;
    const {reasoning_content: reasoning, content, tool_calls: calls} = choice.delta;
    if (reasoning || content || calls) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    this.reasoning += reasoning ?? '';
    if (content || calls) this.thought ??= this.last;
    this.content += content ?? '';
    for (const call of calls ?? []) this.takeCall(call);
    this.finish = choice.finish_reason ?? this.finish;
    if (!this.drawing) {
      this.drawing = true;
      requestAnimationFrame(() => this.draw());
    }
  }

  takeCall(delta) {
    this.calls[delta.index] ??= {id: delta.id, type: 'function', function: {name: delta.function.name, arguments: ''}};
    this.calls[delta.index].function.arguments += delta.function.arguments ?? '';
  }

  draw() {
    const follow = atEnd();
    this.drawing = false;
    this.drawThinking();
    blocks(this.content).forEach((block, i) => {
      const key = JSON.stringify(block);
      if (this.shown[i] === key) return;
      this.shown[i] = key;
      const element = renderBlock(block);
      if (this.text.children[i]) this.text.children[i].replaceWith(element);
      else this.text.append(element);
    });
    this.calls.forEach((call, i) => {
      this.boxes.children[i] ?? this.boxes.append(make('div.call', make('b', call.function.name), make('pre', make('code'))));
      this.boxes.children[i].querySelector('code').textContent = call.function.arguments;
    });
    if (follow) toEnd();
  }

  drawThinking() {
    if (!this.reasoning) return;
    this.thinking.hidden = false;
    this.thinking.lastChild.textContent = this.reasoning;
    if (this.thought && !this.folded) {
      this.folded = true; // once: whoever opens it again wants it open
      this.thinking.open = false;
      this.thinking.firstChild.textContent = `Thought for ${seconds(this.thought - this.began)}`;
    }
  }

  /** What a tool gave, under its call. */
  result(i, text) {
    this.boxes.children[i].append(make('pre.result', make('code', text)));
  }

  end(note) {
    this.draw();
    this.element.classList.remove('waiting');
    if (this.reasoning && !this.thought) this.thinking.firstChild.textContent = 'Thought, and said nothing';
    const facts = note ? [note] : [];
    if (this.finish === 'length') facts.push('cut off at the limit of tokens');
    if (this.usage) facts.push(`${this.usage.completion_tokens} tokens`);
    if (this.first) facts.push(`first after ${seconds(this.first - this.began)}`);
    if (this.usage && this.last - this.first > MIN_RATE_MS) {
      facts.push(`${((this.usage.completion_tokens - 1) / (this.last - this.first) * 1000).toFixed(1)} tok/s`);
    }
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (this.usage) facts.push(`prompt ${this.usage.prompt_tokens}${cached ? `, ${cached} cached` : ''}`);
    this.meta.replaceChildren(...facts.map(fact => make('span', fact)));
  }
}

const seconds = ms => ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
const atEnd = () => $('log').scrollHeight - $('log').scrollTop - $('log').clientHeight < 60;
const toEnd = () => { $('log').scrollTop = $('log').scrollHeight; };

/* ---- demonstration tools ---- */

const TOOLS = {
  get_weather: {
    description: 'Get the weather for a city',
    properties: {city: {type: 'string', description: 'The city name'}},
    run: ({city}) => ({city, weather: ['sunny', 'cloudy', 'rainy', 'windy'][String(city).length % 4], temperature: 12 + String(city).length}),
  },
  get_time: {
    description: 'Get the current date and time',
    properties: {},
    run: () => ({time: new Date().toString()}),
  },
};

const toolList = () => Object.entries(TOOLS).map(([name, tool]) => ({
  type: 'function',
  function: {
    name, description: tool.description,
    parameters: {type: 'object', properties: tool.properties, required: Object.keys(tool.properties)},
  },
}));

function runTool(call) {
  try {
    const tool = TOOLS[call.function.name];
    return JSON.stringify(tool ? tool.run(JSON.parse(call.function.arguments || '{}')) : {error: 'no such tool'});
  } catch (error) {
    return JSON.stringify({error: error.message});
  }
}

/* ---- the conversation ---- */

const MAX_TOOL_ROUNDS = 5;
let messages = [];
let running = null; // the Answer under way

function number(id, convert) {
  const value = convert($(id).value);
  return Number.isFinite(value) ? value : undefined;
}

function requestBody(talk) {
  const system = $('system').value.trim();
  const body = {
    model,
    messages: [...(system ? [{role: 'system', content: system}] : []), ...talk],
    temperature: number('temperature', parseFloat),
    max_tokens: number('max-tokens', parseInt),
    seed: number('seed', parseInt),
  };
  if ($('thinking').value === 'off') body.thinking = {type: 'disabled'};
  else body.reasoning_effort = $('thinking').value;
  if ($('tools').checked) body.tools = toolList();
  return body;
}

/** One answer of the model, into talk: the messages it was asked with, even if others have begun. false: it did not come to its end. */
async function answerOnce(talk) {
  const view = new AnswerView();
  $('log').append(view.element);
  toEnd();
  running = new Answer(requestBody(talk));
  let note = '';
  try {
    await running.run(chunk => view.take(chunk), () => { view.meta.textContent = 'connection lost, going on …'; });
    if (running.stopped) note = 'stopped';
  } catch (error) {
    note = 'failed';
    view.element.insertBefore(make('p.notice', error.message), view.meta);
  }
  view.end(note);
  const answer = {role: 'assistant', content: view.content};
  if (view.reasoning) answer.reasoning_content = view.reasoning;
  if (view.calls.length && !note) answer.tool_calls = view.calls;
  if (!note || view.content) talk.push(answer);
  if (!answer.tool_calls) return false;
  view.calls.forEach((call, i) => {
    const result = runTool(call);
    view.result(i, result);
    talk.push({role: 'tool', tool_call_id: call.id, content: result});
  });
  return true;
}

async function say(text) {
  if (running) return;
  $('empty').hidden = true;
  const talk = messages; // another once it was cleared
  talk.push({role: 'user', content: text});
  $('log').append(make('div.said', text));
  $('send').hidden = true;
  $('stop').hidden = false;
  for (let round = 0; round < MAX_TOOL_ROUNDS && await answerOnce(talk) && talk === messages; round++);
  running = null;
  $('send').hidden = false;
  $('stop').hidden = true;
  toEnd();
}

function fitPrompt() {
  $('prompt').style.height = 'auto';
  $('prompt').style.height = `${$('prompt').scrollHeight}px`;
}

function submitPrompt() {
  const text = $('prompt').value.trim();
  if (!text || running) return;
  $('prompt').value = '';
  fitPrompt();
  say(text);
}

function startChat() {
  for (const text of ['What is the capital of France?', 'Count from 1 to 10.', 'What is 7 times 8?']) {
    const button = make('button', text);
    button.type = 'button';
    button.addEventListener('click', () => say(text));
    $('suggestions').append(button);
  }
  $('composer').addEventListener('submit', event => { event.preventDefault(); submitPrompt(); });
  $('prompt').addEventListener('input', fitPrompt);
  $('prompt').addEventListener('keydown', event => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); submitPrompt(); }
  });
  document.addEventListener('keydown', event => { if (event.key === 'Escape') running?.stop(); });
  $('stop').addEventListener('click', () => running?.stop());
  $('clear').addEventListener('click', () => {
    running?.stop();
    messages = [];
    $('log').replaceChildren($('empty'));
    $('empty').hidden = false;
    $('prompt').focus();
  });
  $('settings-button').addEventListener('click', () => {
    $('settings').hidden = !$('settings').hidden;
    $('settings-button').setAttribute('aria-expanded', String(!$('settings').hidden));
  });
  $('key').addEventListener('change', fetchCluster);
  window.addEventListener('pagehide', () => running?.stop());
}

/* ---- cluster: what is remembered between two looks ---- */

const POLL_MS = 2000;
const SAMPLES = 60;
const WINDOW = 3; // looks a rate is taken over: members tell their counters once a heartbeat, not when we look
const past = new Map(); // name -> [{at, value, rate}]
let before = null; // the cluster at the last look

/** Remembers a counter's value; its rate per second. */
function rateOf(name, value) {
  const list = past.get(name) ?? [];
  past.set(name, list);
  const at = performance.now();
  if (list.length && value < list.at(-1).value) list.length = 0; // another process by that name
  const from = list.at(-WINDOW) ?? list[0];
  const rate = from ? (value - from.value) / (at - from.at) * 1000 : 0;
  list.push({at, value, rate});
  if (list.length > SAMPLES) list.shift();
  return rate;
}

/** Remembers a gauge for its line. */
function noteOf(name, value) {
  const list = past.get(name) ?? [];
  past.set(name, list);
  list.push({at: performance.now(), value, rate: value});
  if (list.length > SAMPLES) list.shift();
  return value;
}

function sparkline(name) {
  const rates = (past.get(name) ?? []).map(sample => sample.rate);
  const top = Math.max(1e-9, ...rates);
  const at = (rate, i) => `${i + SAMPLES - rates.length},${(19 - rate / top * 17).toFixed(1)}`;
  const line = rates.map(at).join(' ');
  const picture = svg('svg', {viewBox: `0 0 ${SAMPLES - 1} 20`, preserveAspectRatio: 'none', 'aria-hidden': 'true'});
  if (rates.length > 1) {
    picture.append(svg('polygon', {class: 'spark-area', points: `${SAMPLES - rates.length},20 ${line} ${SAMPLES - 1},20`}),
                   svg('polyline', {class: 'spark-line', points: line}));
  }
  return picture;
}

const short = value => value >= 99950 ? `${Math.round(value / 1000)}k` : value >= 9995 ? `${(value / 1000).toFixed(1)}k`
  : value >= 99.5 || value === 0 ? String(Math.round(value)) : value.toFixed(1);
const sum = (cluster, role, counter) =>
  cluster.members.filter(member => member.role === role).reduce((total, member) => total + (member.counters[counter] ?? 0), 0);

/* ---- cluster: tiles and members ---- */

function tile(name, value, unit, picture) {
  return make('div.tile', make('div.name', name), make('div.value', value, ' ', make('small', unit)), picture);
}

function bar(share) {
  const picture = svg('svg', {viewBox: '0 0 100 6', preserveAspectRatio: 'none', 'aria-hidden': 'true'},
                      svg('rect', {x: 0, y: 0, height: 6, width: Math.min(100, share * 100)}));
  return make('div.bar', picture);
}

function drawTiles(cluster) {
  const tokens = rateOf('tokens', sum(cluster, 'gateway', 'generated_tokens_total'));
  const streams = noteOf('streams', sum(cluster, 'gateway', 'streams'));
  const waiting = sum(cluster, 'router', 'sequences_waiting');
  const running = noteOf('running', sum(cluster, 'router', 'sequences_running'));
  const pages = sum(cluster, 'router', 'kv_pages_used'), all = sum(cluster, 'router', 'kv_pages');
  const ready = cluster.members.filter(member => member.state === 'ready').length;
  $('tiles').replaceChildren(
    tile('Tokens generated', short(tokens), 'a second', sparkline('tokens')),
    tile('Streams', String(streams), 'open', sparkline('streams')),
    tile('Sequences', String(running), `running, ${waiting} waiting`, sparkline('running')),
    tile('KV pages', String(pages), `of ${all} used`, bar(all ? pages / all : 0)),
    tile('Members', String(ready), `of ${cluster.members.length} ready`, bar(ready / cluster.members.length)),
    tile('Epoch', String(cluster.epoch), cluster.changing ? 'the next one is on its way' : 'in force', make('div.hint',
      cluster.coordinator ? 'coordinator heard' : 'no coordinator: serving goes on')));
}

const STATES = {ready: 'good', joining: 'busy', preparing: 'busy', suspect: 'bad', leaving: 'busy'};
const DOES = {
  gateway: {counter: 'generated_tokens_total', unit: 'tok/s', text: c => `${c.streams ?? 0} open streams, ${c.requests_total ?? 0} requests so far`},
  router: {counter: 'step_rows_total', unit: 'rows/s',
           text: c => `${c.sequences_running ?? 0} running, ${c.sequences_waiting ?? 0} waiting, KV ${c.kv_pages ? Math.round(100 * c.kv_pages_used / c.kv_pages) : 0} %`},
  worker: {counter: 'expert_rows_total', unit: 'rows/s', text: (c, id) => `${c.experts_held ?? 0} experts${shareText(id)}`},
};
const ROLES = ['gateway', 'router', 'worker'];

function shareText(id) {
  const share = heat.shares?.get(id);
  return share === undefined ? '' : `, ${(100 * share).toFixed(0)} % of the load`;
}

function memberRow(member) {
  const name = `${member.role}-${member.id}`;
  const does = DOES[member.role];
  const rate = rateOf(name, member.counters[does.counter] ?? 0);
  const state = member.state || 'unknown';
  return make('tr',
    make('td', name, ...(member.answers_you ? [make('span.you', ' this one')] : [])),
    make('td', make(`span.dot.${STATES[state] ?? 'busy'}`), state),
    make('td.epoch', String(member.epoch)),
    make('td.does', does.text(member.counters, member.id)),
    make('td.number', `${short(rate)} ${does.unit}`),
    make('td.spark', sparkline(name)));
}

function drawMembers(cluster) {
  const members = cluster.members.filter(member => DOES[member.role]);
  members.sort((a, b) => ROLES.indexOf(a.role) - ROLES.indexOf(b.role) || a.id - b.id);
  $('members').replaceChildren(...members.map(memberRow));
  $('changing').hidden = !cluster.changing;
}

function news(text) {
  $('news').prepend(make('li', make('time', new Date().toLocaleTimeString()), text));
  while ($('news').children.length > 50) $('news').lastChild.remove();
}

function drawNews(cluster) {
  const names = list => new Map(list.members.map(member => [`${member.role}-${member.id}`, member.state]));
  const now = names(cluster), was = before ? names(before) : null;
  if (!was) news(`epoch ${cluster.epoch} in force, ${cluster.members.length} members`);
  else if (before.epoch !== cluster.epoch) news(`epoch ${cluster.epoch} in force`);
  for (const [name, state] of was ? now : []) {
    if (!was.has(name)) news(`${name} is new (${state})`);
    else if (was.get(name) !== state) news(`${name}: ${was.get(name)} → ${state}`);
  }
  for (const name of was ? was.keys() : []) if (!now.has(name)) news(`${name} is gone`);
  before = cluster;
}

/* ---- cluster: the heat map ---- */

const heat = {epoch: 0, layers: 0, experts: 0, rows: null, owners: null, cell: null, shares: null, picture: null};
const RATIOS = [0.25, 0.5, 1, 2, 4, 8]; // of the layer's mean: where the six colours of the ramp stand

function bytes(base64) {
  return Uint8Array.from(atob(base64), character => character.charCodeAt(0));
}

function takePlacement(placement) {
  const copies = bytes(placement.copies), owners = bytes(placement.owners);
  let at = 0;
  heat.ranks = placement.ranks;
  heat.owners = Array.from(copies, n => Array.from({length: n}, () => owners[at++] | owners[at++] << 8));
}

/** Levels are eight to a doubling. */
function takeLoad(levels) {
  heat.rows = Array.from(levels, level => level ? 2 ** ((level - 1) / 8) : 0);
  heat.sums = Array.from({length: heat.layers},
    (_, layer) => heat.rows.slice(layer * heat.experts, (layer + 1) * heat.experts).reduce((a, b) => a + b, 0));
  const all = heat.sums.reduce((a, b) => a + b, 0);
  heat.shares = new Map(heat.ranks.map(id => [id, 0]));
  heat.rows.forEach((rows, i) => {
    for (const rank of heat.owners[i]) {
      const id = heat.ranks[rank];
      heat.shares.set(id, heat.shares.get(id) + (all ? rows / all / heat.owners[i].length : 0));
    }
  });
}

async function fetchExperts() {
  const response = await api(`/v1/cluster/experts?epoch=${heat.owners ? heat.epoch : 0}`);
  if (!response.ok) throw await refusal(response);
  const experts = await response.json();
  Object.assign(heat, {epoch: experts.epoch, layers: experts.layers, experts: experts.experts});
  if (experts.placement) takePlacement(experts.placement);
  if (experts.load && heat.owners) takeLoad(bytes(experts.load));
}

const ramp = () => getComputedStyle(document.documentElement).getPropertyValue('--ramp').trim().split(/\s+/)
  .map(colour => [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16)));
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The colour of a share of the layer's mean. */
function rampColour(colours, ratio) {
  const place = Math.min(RATIOS.length - 1, Math.max(0, Math.log2(ratio / RATIOS[0])));
  const low = Math.min(RATIOS.length - 2, Math.floor(place));
  const mixed = colours[low].map((part, i) => Math.round(part + (colours[low + 1][i] - part) * (place - low)));
  return `rgb(${mixed.join(' ')})`;
}

const ownerColour = rank => `hsl(${(rank * 137.5 + 190) % 360} 48% 52%)`;

/** The colour of each cell, by what is chosen to be shown. */
function cellColours() {
  const colours = ramp(), none = css('--none');
  if ($('colour').value === 'owner') return heat.owners.map(owners => owners.length ? ownerColour(owners[0]) : none);
  return heat.owners.map((_, i) => {
    const mean = heat.rows ? heat.sums[Math.floor(i / heat.experts)] / heat.experts : 0;
    return mean && heat.rows[i] ? rampColour(colours, heat.rows[i] / mean) : none;
  });
}

/** Where the cells are, in CSS pixels. A cell has two pixels at least: what does not fit can be scrolled to. */
function heatLayout() {
  const left = 46, top = 4, bottom = 36;
  const width = Math.max(2, Math.min(90, ($('heat-scroll').clientWidth - left - 14) / heat.experts));
  const height = Math.max(5, Math.min(26, Math.floor(380 / heat.layers)));
  return {left, top, width, height, all: Math.floor(left + width * heat.experts + 14), tall: top + height * heat.layers + bottom};
}

/** Every how many a number stands at an axis so that they keep a distance of some pixels. */
function tickStep(cell, pixels) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100].find(step => step * cell >= pixels) ?? 128;
}

function drawAxes(paint, at) {
  paint.fillStyle = css('--dim');
  paint.font = '12px system-ui, sans-serif';
  paint.textBaseline = 'middle';
  paint.textAlign = 'right';
  for (let layer = 0; layer < heat.layers; layer += tickStep(at.height, 15)) {
    paint.fillText(String(layer), at.left - 6, at.top + (layer + 0.5) * at.height);
  }
  paint.textAlign = 'center';
  const base = at.top + at.height * heat.layers;
  for (let expert = 0; expert < heat.experts; expert += tickStep(at.width, 30)) {
    paint.fillText(String(expert), at.left + (expert + 0.5) * at.width, base + 11);
  }
  paint.textAlign = 'left';
  paint.fillText('expert', at.left, base + 27);
  paint.save();
  paint.translate(9, at.top + at.height * heat.layers / 2);
  paint.rotate(-Math.PI / 2);
  paint.textAlign = 'center';
  paint.fillText('layer', 0, 0);
  paint.restore();
}

/** Its place and size on the canvas: whole pixels, also where cells have a fraction of one. */
function cellBox(i, at) {
  const column = i % heat.experts, row = Math.floor(i / heat.experts), gap = at.width >= 7 && at.height >= 7 ? 1 : 0;
  const x = Math.round(column * at.width), next = Math.round((column + 1) * at.width);
  return [at.left + x, at.top + row * at.height, next - x - gap, at.height - gap];
}

/** Paints the map beside the screen, so that the cursor can move over it without all cells being painted again. */
function drawHeat() {
  if (!heat.owners || !heat.layers) return;
  const at = heatLayout(), scale = window.devicePixelRatio || 1;
  const picture = heat.picture = document.createElement('canvas');
  picture.width = Math.round(at.all * scale);
  picture.height = Math.round(at.tall * scale);
  const paint = picture.getContext('2d');
  paint.scale(scale, scale);
  cellColours().forEach((colour, i) => {
    paint.fillStyle = colour;
    paint.fillRect(...cellBox(i, at));
  });
  drawAxes(paint, at);
  drawLegend();
  showHeat(at, scale);
}

function showHeat(at, scale) {
  const canvas = $('heat');
  canvas.width = heat.picture.width;
  canvas.height = heat.picture.height;
  canvas.style.width = `${at.all}px`;
  canvas.style.height = `${at.tall}px`;
  const paint = canvas.getContext('2d');
  paint.drawImage(heat.picture, 0, 0);
  if (heat.cell !== null) {
    const [x, y, width, height] = cellBox(heat.cell, at);
    paint.scale(scale, scale);
    paint.strokeStyle = css('--text');
    paint.lineWidth = 2;
    paint.strokeRect(x - 1, y - 1, width + 2, height + 2);
  }
  describeCell();
}

function swatch(colour, text) {
  return make('span', svg('svg', {viewBox: '0 0 15 11', 'aria-hidden': 'true'}, svg('rect', {width: 15, height: 11, fill: colour})), text);
}

function drawLegend() {
  const WORKERS = 12, byOwner = $('colour').value === 'owner';
  const colours = ramp(), none = css('--none');
  const list = byOwner
    ? heat.ranks.slice(0, WORKERS).map((id, rank) => swatch(ownerColour(rank), `worker-${id}`))
    : [swatch(none, 'none'), ...RATIOS.map(ratio => swatch(rampColour(colours, ratio), `${ratio < 1 ? `1/${1 / ratio}` : ratio} ×`)), make('span', 'the mean')];
  if (byOwner && heat.ranks.length > WORKERS) list.push(make('span', `and ${heat.ranks.length - WORKERS} more`));
  $('legend').replaceChildren(...list);
  $('heat-note').textContent = byOwner ? 'The worker that owns each expert; of several, the first.'
    : "Rows of the last minute or two, per layer and expert, as a multiple of the layer's mean.";
}

function describeCell() {
  if (heat.cell === null) {
    $('heat-text').textContent = heat.rows ? 'Point at a cell, or use the arrow keys.' : 'No row has been counted yet: ask the model something.';
    return;
  }
  const layer = Math.floor(heat.cell / heat.experts), owners = heat.owners[heat.cell].map(rank => `worker-${heat.ranks[rank]}`).join(', ');
  const share = heat.rows && heat.sums[layer] ? heat.rows[heat.cell] / heat.sums[layer] : 0;
  $('heat-text').textContent = `Layer ${layer}, expert ${heat.cell % heat.experts}: ${(100 * share).toFixed(share < 0.1 ? 2 : 1)} % of the layer's rows, `
    + `${(share * heat.experts).toFixed(2)} × its mean, ${owners || 'nobody has it'}`;
}

function pickCell(event) {
  if (!heat.owners) return;
  const at = heatLayout(), box = $('heat').getBoundingClientRect();
  const expert = Math.floor((event.clientX - box.left - at.left) / at.width), layer = Math.floor((event.clientY - box.top - at.top) / at.height);
  const inside = expert >= 0 && expert < heat.experts && layer >= 0 && layer < heat.layers;
  moveCell(inside ? layer * heat.experts + expert : null);
}

function moveCell(cell) {
  if (cell === heat.cell || !heat.picture) return;
  heat.cell = cell;
  showHeat(heatLayout(), window.devicePixelRatio || 1);
}

function keyCell(event) {
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heat.experts, ArrowDown: heat.experts}[event.key];
  if (!step || !heat.owners) return;
  event.preventDefault();
  const next = (heat.cell ?? 0) + step;
  if (next >= 0 && next < heat.layers * heat.experts) moveCell(next);
}

/* ---- cluster: looking ---- */

let looking = 0; // which watch is under way: a newer one ends those before it
let timer = 0;

async function look() {
  const cluster = await fetchCluster();
  $('trouble').hidden = cluster !== null;
  if (!cluster) {
    $('trouble').textContent = `Not shown now: ${$('server').textContent}.`;
    return;
  }
  drawTiles(cluster);
  try {
    await fetchExperts();
    drawHeat();
  } catch (error) {
    $('heat-text').textContent = error.message;
  }
  drawMembers(cluster);
  drawNews(cluster);
}

/** Asks while the cluster is on the screen, and not otherwise. */
async function watch() {
  const mine = ++looking;
  clearTimeout(timer);
  if ($('view-cluster').hidden || document.visibilityState !== 'visible') return;
  await look();
  if (mine === looking) timer = setTimeout(watch, POLL_MS);
}

function startCluster() {
  $('heat').addEventListener('pointermove', pickCell);
  $('heat').addEventListener('pointerdown', pickCell);
  $('heat').addEventListener('pointerleave', () => moveCell(null));
  $('heat').addEventListener('keydown', keyCell);
  $('heat').addEventListener('focus', () => moveCell(heat.cell ?? 0));
  $('colour').addEventListener('change', drawHeat);
  window.addEventListener('resize', drawHeat);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawHeat);
  document.addEventListener('visibilitychange', watch);
}

/* ---- tabs ---- */

function showTab(name, focus) {
  for (const each of ['chat', 'cluster']) {
    $(`tab-${each}`).setAttribute('aria-selected', String(each === name));
    $(`tab-${each}`).tabIndex = each === name ? 0 : -1;
    $(`view-${each}`).hidden = each !== name;
  }
  if (focus) $(`tab-${name}`).focus();
  window.history.replaceState(null, '', name === 'chat' ? location.pathname : `#${name}`); // a reload finds the same tab
  watch();
}

function startTabs() {
  for (const name of ['chat', 'cluster']) {
    $(`tab-${name}`).addEventListener('click', () => showTab(name, false));
    $(`tab-${name}`).addEventListener('keydown', event => {
      if (event.key === 'ArrowLeft' || event.key === 'ArrowRight') showTab(name === 'chat' ? 'cluster' : 'chat', true);
    });
  }
  window.addEventListener('hashchange', () => showTab(location.hash === '#cluster' ? 'cluster' : 'chat', false));
  showTab(location.hash === '#cluster' ? 'cluster' : 'chat', false);
}

startChat();
startCluster();
startTabs();
if ($('view-cluster').hidden) fetchCluster();
