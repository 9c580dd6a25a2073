-- gate: what every script of a limit shares. The loader puts this file in front of each of them.
--
-- KEYS[1]  gate      hash    'state', see below; 'p:<process>' its record; 'a:<process>' its last answer;
--                            'p:<process>~<number>' what it left behind when the gate was set back, for a lease
-- KEYS[2]  leases    zset    process -> end of its lease, us
-- KEYS[3]  starts    list    latest moments at which the runs of the window may start, us, oldest first
-- KEYS[4]  tickets   zset    process that waits for the gate -> ticket
-- KEYS[5]  later     zset    job id -> due time, us
-- KEYS[6]  jobs      hash    job id -> 'attempt place deaths refused backs saved flow', from first claim to done
--                            saved: where its checkpoint stands, if it has one: 1 in `saved`, 2 under kept:<b>:<i>
-- KEYS[7]  flows     set     flows whose workers have called
-- KEYS[8]  override  string  the operator's word, see override.lua
-- Beside them, computed: queue:<flow>, idle:<flow>, saved, kept:<b>:<i>, events (what happened, see `event`),
-- samples (what the fleet did, see trail.lua), blob:<b>:<i>:<a> (an outcome too large for a call, until it is
-- recorded) and the keys OF_BATCH; all in one slot.
--
-- ARGV[1]  process  id of the calling pump ('' for a producer)
-- ARGV[2]  now      us; '' takes Redis' own TIME (tests pass a time)
--
-- Time is integer microseconds of Redis' clock, made monotone by `last`.

local GATE, LEASES, STARTS, TICKETS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local LATER, JOBS, FLOWS, OVERRIDE = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local ROOT = string.sub(GATE, 1, -5)
local SAVED, EVENTS = ROOT .. 'saved', ROOT .. 'events'
local INLINE, BESIDE = 1, 2 -- where a checkpoint stands
local PARKED = 4503599627370496 -- 2^52: beyond every place, and what a double still counts exactly
local WEEK = 604800000 -- ms
local GRACE = 200000 -- us a woken head may stay silent before it goes to the tail

-- The state, one JSON object of numbers in the gate's field `state`:
--   gen         birth, us; 0 = no gate yet
--   cold        1 while a gate that lost its data holds admissions
--   last        time of the last call, us
--   attempt     counter of claims and permits; starts at the birth, never repeats
--   place       virtual time of the queue: the highest place taken
--   processes   counter of process numbers
--   in_use      sum of all held
--   active      processes that hold or wait by ticket
--   waiting     tickets
--   callers     tickets of those that want permits
--   behind      1 while processes may stand idle although jobs of their flows wait
--   ticket      counter of tickets
--   level       concurrency allowed now, a float
--   ceiling     what the level was last bounded by
--   cut         attempt counter at the last cut
--   oks         successes since the last growth
--   quiet       when a run admitted since the last cut last ended, us
--   pause       nothing is admitted before, us
--   slack       us a grant may take to start
--   slack_at    when the slack last changed, us
--   next_start  with even pacing: no start is granted before, us
--   due         earliest delayed run, us; 0 = none
--   reap_at     no lease ends before, us
--   woken_due   when the woken head was told to call, us
--   kept_for    number of the process for which a place is left free, because another gate refuses it; 0 = none
--   kept_until  no longer than that, us
--   touched     when the lifetimes were last renewed, us
--   flows       number of flows served
--   config_from start of the process whose limits are in force, us
--   bound       least level known to be refused, whole: where the last cut fell, less one for each further
--               refusal of its spell; 0 = none known
--   rounds      levels' worths of successes since the last cut, a float
--   streak      cuts since the last success
--   halt        us for which the fleet last halted of itself; 0 = not since the last success
--   admitted    when a run was last admitted, us
--   told        when a cut or a recovery was last told, us
--   sampled     when the last sample was taken, us, and peak, the most slots in use since then
--   max min initial rate window lease backoff threshold factor additive even   those limits
-- Beside it, as fields of their own: `woken`, the head that was told to call, `override`, `config`, those
-- limits as they were brought. Read only where they matter: `rivals`, other values that were told in the
-- trail; `told_level`, the level that was told last; `stepped`, the last step back of the clock that was told.

local function whole(number)
  return string.format('%.0f', number)
end

local function exact(number)
  return string.format(number % 1 == 0 and '%.0f' or '%.17g', number)
end

local function read_record(text)
  local n, held, seq, extended, kind, idle, flows, ends, want, since, pushed =
    string.match(text or '', '^(%d+) (%d+) (%d+) (%d) (%S) (%d) (%d+) (%d+) (%d+) (%d+) ?(%S*)$')
  if not n then return nil end
  return {
    number = tonumber(n), held = tonumber(held), seq = tonumber(seq), extended = extended == '1',
    kind = kind, idle = idle == '1', flows = tonumber(flows), ends = tonumber(ends),
    -- kind: what it waits for by ticket: 'p' permits, 's' permits of several gates at once (and perhaps of
    -- this one alone), 'j' jobs, '-' nothing
    want = tonumber(want), -- permits it may be granted in its wake message
    since = tonumber(since), -- when what it holds last changed, us
    pushed = pushed, -- what wake messages granted it since its last call, each 'attempt:count:stamp,'
  }
end

local function write_record(r)
  return string.format('%d %d %d %d %s %d %d %d %d %d %s', r.number, r.held, r.seq,
    r.extended and 1 or 0, r.kind, r.idle and 1 or 0, r.flows, r.ends, r.want, r.since, r.pushed)
end

local function is_active(record)
  return (record.held > 0 or record.kind ~= '-') and 1 or 0
end

local function calls(kind) return (kind == 'p' or kind == 's') and 1 or 0 end

-- One format, not a loop: this runs in every call.
local function write_state(s)
  return string.format('{"gen":%d,"cold":%d,"last":%d,"attempt":%d,"place":%d,"processes":%d,"in_use":%d,'
    .. '"active":%d,"waiting":%d,"callers":%d,"behind":%d,"ticket":%d,"level":%.17g,"ceiling":%d,"cut":%d,'
    .. '"oks":%d,"quiet":%d,"pause":%d,"slack":%d,"slack_at":%d,"due":%d,"reap_at":%d,"woken_due":%d,'
    .. '"touched":%d,"flows":%d,"config_from":%d,"bound":%d,"rounds":%.17g,"streak":%d,'
    .. '"halt":%d,"admitted":%d,"told":%d,'
    .. '"sampled":%d,"peak":%d,"max":%d,"min":%d,"initial":%d,"rate":%d,'
    .. '"window":%d,"lease":%d,"backoff":%.17g,"threshold":%d,"factor":%.17g,"additive":%d,"even":%d,'
    .. '"next_start":%d,"kept_for":%d,"kept_until":%d}',
    s.gen, s.cold, s.last, s.attempt, s.place, s.processes, s.in_use,
    s.active, s.waiting, s.callers, s.behind, s.ticket, s.level, s.ceiling, s.cut,
    s.oks, s.quiet, s.pause, s.slack, s.slack_at, s.due, s.reap_at, s.woken_due,
    s.touched, s.flows, s.config_from, s.bound, s.rounds, s.streak,
    s.halt, s.admitted, s.told,
    s.sampled, s.peak, s.max, s.min, s.initial, s.rate,
    s.window, s.lease, s.backoff, s.threshold, s.factor, s.additive, s.even, s.next_start,
    s.kept_for, s.kept_until)
end

local function zero() return 0 end

-- Whether every value is a number that a state may hold; an error where one is no number at all.
local function is_sound(state)
  for _, value in pairs(state) do
    if value - value ~= 0 or value < 0 then return false end
  end
  return true
end

-- A number that is missing reads as 0. So does a poisoned one (no number, infinite, negative), and each of
-- what is no state at all; these are named in `poisoned`, see heal.lua.
local function read_state(text)
  local state, poisoned = text and cjson.decode(text) or {}, nil
  if text and not state.gen then error('no state') end
  local read, sound = pcall(is_sound, state)
  if not (read and sound) then
    for name, value in pairs(state) do
      if not (type(value) == 'number' and value >= 0 and value < math.huge) then
        state[name] = nil
        poisoned = (poisoned and poisoned .. ',' or '') .. name
      end
    end
  end
  return setmetatable(state, { __index = zero }), poisoned
end

-- The state, and the record of `process`; one that cannot be read is none, and named as poisoned.
local function load(process)
  local found = redis.call('HMGET', GATE, 'state', 'p:' .. process, 'woken', 'override', 'config')
  local sound, state, poisoned = pcall(read_state, found[1])
  if not sound then state, poisoned = setmetatable({}, { __index = zero }), 'state' end
  local record = read_record(found[2])
  if found[2] and not record then poisoned = (poisoned and poisoned .. ',' or '') .. 'p:' .. process end
  state.poisoned = poisoned or false
  state.woken, state.override, state.config = found[3] or '', found[4] or '', found[5] or ''
  state.was_woken, state.was_override, state.was_config = state.woken, state.override, state.config
  return state, record
end

-- Write the state, with `extra` field, value pairs, in one command. A poisoned state is left as it is for
-- the call that heals it.
local function save(state, extra)
  local fields = extra or {}
  local n = #fields
  if not state.poisoned then fields[n + 1], fields[n + 2] = 'state', write_state(state) end
  n = #fields
  if state.woken ~= state.was_woken then fields[n + 1], fields[n + 2] = 'woken', state.woken end
  n = #fields
  if state.override ~= state.was_override then fields[n + 1], fields[n + 2] = 'override', state.override end
  n = #fields
  if state.config ~= state.was_config then fields[n + 1], fields[n + 2] = 'config', state.config end
  if #fields > 0 then redis.call('HSET', GATE, unpack(fields)) end
end

-- One entry of the trail, at `at` us: what happened, why, the values before and after, and who did it.
-- Written only when something happens; the trail keeps about 1,000 entries, for a week after the last.
local function event(at, what, why, from, to, who)
  redis.call('XADD', EVENTS, 'MAXLEN', '~', 1000, '*', 'at', whole(at), 'what', what, 'why', why,
    'from', from, 'to', to, 'who', who)
  redis.call('PEXPIRE', EVENTS, WEEK)
end

local function clock(state)
  local now = tonumber(ARGV[2])
  if not now then
    local time = redis.call('TIME')
    now = tonumber(time[1]) * 1000000 + tonumber(time[2])
  end
  if now < state.last - 1000000 and redis.call('HGET', GATE, 'stepped') ~= whole(state.last) then
    event(state.last, 'clock', 'went back', exact(state.last / 1000000), exact(now / 1000000), 'redis')
    redis.call('HSET', GATE, 'stepped', whole(state.last))
  end
  return math.max(now, state.last)
end

-- If no script ran for more than 0.6 lease, Redis was frozen or everybody gone: leases that were alive
-- at the last call are extended by the gap, each process once until it speaks again. Then note the time.
local function extend_after_stall(state, now)
  local gap = now - state.last
  if state.gen > 0 and gap > 0.6 * state.lease then
    local extended = 0
    local alive = redis.call('ZRANGEBYSCORE', LEASES, whole(state.last), '+inf', 'WITHSCORES')
    for i = 1, #alive, 2 do
      local record = read_record(redis.call('HGET', GATE, 'p:' .. alive[i]))
      if record and not record.extended and alive[i] ~= ARGV[1] then
        local ends = tonumber(alive[i + 1])
        record.extended, extended = true, extended + 1
        record.ends = math.max(ends, math.min(ends + gap, now + state.lease))
        redis.call('ZADD', LEASES, whole(record.ends), alive[i])
        redis.call('HSET', GATE, 'p:' .. alive[i], write_record(record))
      end
    end
    state.reap_at = 0
    if extended > 0 then event(now, 'stall', 'no call arrived', '0', exact(gap / 1000000), 'redis') end
  end
  state.last = now
end

-- How long the keys of a gate outlive the last word of its processes.
local function lifetime_ms(state)
  if state.flows > 0 then return WEEK end
  return math.ceil(math.max(state.window, 2 * state.lease) / 1000) + 60000
end

-- Lifetimes are renewed a few times a lease, also by those whose loop is too busy to call: once the state, which
-- says when, is written.
local function lifetimes_are_due(state, now)
  if now - state.touched < state.lease / 3 then return false end
  state.touched = now
  return true
end

local function renew_lifetimes(state)
  for _, key in ipairs({ GATE, LEASES, STARTS, TICKETS, FLOWS }) do redis.call('PEXPIRE', key, lifetime_ms(state)) end
end

-- What a batch has for itself lives until its end and then its own `keep`, ms.
local OF_BATCH = { 'batch:', 'done:', 'out:', 'base:', 'blobs:', 'retries:' }

local function expire_batch(name)
  local keep = redis.call('HGET', ROOT .. 'batch:' .. name, 'keep') or WEEK
  for _, each in ipairs(OF_BATCH) do redis.call('PEXPIRE', ROOT .. each .. name, keep) end
end

-- A count that a batch keeps; nil where it has none, or what stands there is no whole number.
local function count_of(text)
  local readable = text and #text < 16 and (text == '0' or string.match(text, '^-?[1-9]%d*$'))
  return readable and tonumber(text) or nil
end

local function persist_batch(name)
  for _, each in ipairs(OF_BATCH) do redis.call('PERSIST', ROOT .. each .. name) end
end

local function queue_of(flow) return ROOT .. 'queue:' .. flow end
local function idle_of(flow) return ROOT .. 'idle:' .. flow end

-- When the first delayed run is due, us; 0 if there is none. A score that is no time of any clock is due.
local function earliest_due()
  local first = tonumber(redis.call('ZRANGE', LATER, 0, 0, 'WITHSCORES')[2])
  if not first then return 0 end
  local last = tonumber(redis.call('ZRANGE', LATER, -1, -1, 'WITHSCORES')[2])
  return last < PARKED and math.max(1, first) or 1
end

local function read_job(text)
  local attempt, place, deaths, refused, backs, saved, flow =
    string.match(text or '', '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d) (.+)$')
  if not attempt then return nil end
  return {
    attempt = tonumber(attempt), place = tonumber(place), deaths = tonumber(deaths),
    refused = tonumber(refused), backs = tonumber(backs), saved = tonumber(saved), flow = flow,
  }
end

local function write_job(job)
  return string.format('%.0f %.0f %d %d %d %d %s', job.attempt, job.place, job.deaths, job.refused, job.backs,
    job.saved, job.flow)
end

local function channel_of(process) return 'pocketfleet:wake:' .. process end

-- A server that does not let this user publish costs the wake-up only: an error would leave the call half done.
local function tell(process, words)
  local heard = redis.pcall('PUBLISH', channel_of(process), string.match(GATE, '{(.-)}') .. ' ' .. words)
  return type(heard) == 'number' and heard or 0
end

-- Returns how many heard it: 0 = that process is gone (or, on a Cluster, listens at another node).
local function publish(process, wait_us) return tell(process, whole(wait_us)) end

-- Wake the process that has stood idle for the flow the longest, and for each that is gone another one.
local function wake_idle(flow, count)
  local missed, woken = count or 1, 0
  for _ = 1, 4 do
    local popped = redis.call('ZPOPMIN', idle_of(flow), missed)
    woken, missed = woken + #popped / 2, 0
    for i = 1, #popped, 2 do
      if publish(popped[i], 0) == 0 then missed = missed + 1 end
    end
    if missed == 0 then break end
  end
  return woken
end
