-- sync: say what this process holds, wants and has finished; get permits and jobs, or why not and when
-- to ask again. Acquire, release, renew, feedback, claim and finish are this one decision.
--
-- KEYS      as in gate.lua
-- ARGV[3]   seq        number of this call; the same number gets the same answer, a lower one '-1'
-- ARGV[4]   held       slots this process holds now, absolute: permits and running jobs
-- ARGV[5]   permits    permits it has waiters for
-- ARGV[6]   jobs       jobs it has room for
-- ARGV[7]   birth      birth of the gate it remembers, us; 0 = none
-- ARGV[8]   started    when this process first called, us; 0 = this is its first call
-- ARGV[9]   limits     'max min initial rate window lease backoff threshold factor', times in us;
--                      rate 0 = none; '' = keep what the gate has
-- ARGV[10]  override   the operator's values it remembers
-- ARGV[11]  successes  since its last call, of runs admitted under ARGV[12], the cut it knows
-- ARGV[13]  refused    highest attempt that was refused with a rate limit since its last call; 0 = none
-- ARGV[14]  pause      us for which the refused ask the fleet to pause
-- ARGV[15]  returned   'stamp count stamp count': grants that were not used; 'late' in front if the call
--                      took longer than the slack
-- ARGV[16]  leave      1 = this process goes; it holds nothing any more
-- ARGV[17]  flows      how many names of flows follow; then per entry: id, attempt, flow's number, what, arg
--                      what = completed|failed|aborted|quarantined|lost (arg = outcome; with 'blob:' in
--                      front it stands under blob:<b>:<i>:<attempt>) | result:<ms> (arg = arq's record)
--                      | refuse (arg = delay us) | back (granted, never started) | hand (handed back)
--                      | keep (still running; sent after status 1)
--
-- Returns {header, override, ids refused, then per job: id, attempt, deaths, refused, backs, payload}
--   header 'status permits wait now birth started cut level in_use used stamp slack lease reason attempt'
--   status 0 = ok, 1 = you were unknown: nothing admitted, send your claims again with 'keep'
--   reason '-' | level | window | pause | cold | turn | jobs     why less than wanted was given
-- A refusal burns no start and takes no slot; it may take a ticket.
-- Cost: O(entries + jobs + log(processes) + log(queue)); nothing grows with workers or queue length.

local me = ARGV[1]
local call = {
  seq = tonumber(ARGV[3]), held = tonumber(ARGV[4]), permits = tonumber(ARGV[5]), jobs = tonumber(ARGV[6]),
  birth = tonumber(ARGV[7]), started = tonumber(ARGV[8]), limits = ARGV[9], override = ARGV[10],
  successes = tonumber(ARGV[11]), counted_under = tonumber(ARGV[12]), refused = tonumber(ARGV[13]),
  pause = tonumber(ARGV[14]), returned = ARGV[15], leave = ARGV[16] == '1', flows = {},
}
local flow_count = tonumber(ARGV[17])
for i = 1, flow_count do call.flows[i] = ARGV[17 + i] end
local FIRST_ENTRY = 18 + flow_count

local state, was, record = load(me)
local now = clock(state)
local returned_flows = {} -- flows some of whose jobs came back to the queue in this call
local delayed = {} -- flow -> earliest due time of the runs refused in this call

local function chunks(list, size, act)
  for from = 1, #list, size do
    act(unpack(list, from, math.min(from + size - 1, #list)))
  end
end

-- load ------------------------------------------------------------------------------------------

local function take_override(text)
  local max, rate, pause = string.match(text, '^(%S+) (%S+) (%S+)$')
  state.override = max and text or ''
  return tonumber(max or ''), tonumber(rate or ''), tonumber(pause or '')
end

-- The limits in force: of the process that started last, under the operator's override.
local function effective()
  local max, rate, pause = take_override(state.override)
  return max or state.max, rate or state.rate, pause or 0
end

local function take_limits()
  if call.limits == '' or call.started <= state.config_from then return end
  local v = {}
  for word in string.gmatch(call.limits, '%S+') do v[#v + 1] = tonumber(word) end
  state.max, state.min, state.initial, state.rate, state.window, state.lease = v[1], v[2], v[3], v[4], v[5], v[6]
  state.backoff, state.threshold, state.factor = v[7], v[8], v[9]
  state.config_from = call.started
  state.reap_at = 0
end

-- A level at its ceiling follows the ceiling; a level below it stays.
local function bound_level(ceiling)
  if state.level == 0 then state.level = state.initial end
  if state.ceiling > 0 and state.level >= state.ceiling then state.level = ceiling end
  state.level = math.max(math.min(state.min, ceiling), math.min(state.level, ceiling))
  state.ceiling = ceiling
end

local function create_gate()
  state.gen, state.attempt, state.place = now, now, 1
  state.override = redis.call('GET', OVERRIDE) or ''
  if state.override == '' and call.override ~= '' then
    state.override = call.override
    redis.call('SET', OVERRIDE, call.override)
  end
  redis.call('DEL', FLOWS)
end

local function lifetime_ms()
  if state.flows > 0 then return WEEK end
  return math.ceil(math.max(state.window, 2 * state.lease) / 1000) + 60000
end

local function expire(key) redis.call('PEXPIRE', key, lifetime_ms()) end

-- Claims that no living record owns go back to their places (a gate that is new, a flow first served).
local function sweep(flow)
  local ids = redis.call('ZRANGEBYSCORE', queue_of(flow), whole(PARKED + 1), '+inf')
  for _, id in ipairs(ids) do
    local job = read_job(redis.call('HGET', JOBS, id))
    redis.call('ZADD', queue_of(flow), whole(job and job.place or state.place), id)
    redis.call('DEL', 'arq:in-progress:' .. id)
  end
end

local function join()
  if not record then
    state.processes = state.processes + 1
    record = { number = state.processes, held = 0, seq = 0, kind = '-', idle = false, flows = 0, ends = 0 }
    state.touched = 0
  end
  if record.flows ~= flow_count then
    for _, flow in ipairs(call.flows) do
      if redis.call('SADD', FLOWS, flow) == 1 then sweep(flow) end
    end
    record.flows = flow_count
    state.flows = redis.call('SCARD', FLOWS)
    state.touched = 0
  end
  record.extended = false
  state.active = state.active - is_active(record)
end

-- reap ------------------------------------------------------------------------------------------

-- The jobs of a process that is gone go back to their own places, with one death more each if it died.
local function return_jobs(number, died)
  for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
    local queue, parked = queue_of(flow), whole(PARKED + number)
    local ids = redis.call('ZRANGEBYSCORE', queue, parked, parked)
    for _, id in ipairs(ids) do
      local job = read_job(redis.call('HGET', JOBS, id))
      if job then
        job.deaths = job.deaths + died
        redis.call('HSET', JOBS, id, write_job(job))
      end
      redis.call('ZADD', queue, whole(job and job.place or state.place), id)
      redis.call('DEL', 'arq:in-progress:' .. id)
      returned_flows[flow] = true
    end
  end
end

local function bury(process)
  local dead = read_record(redis.call('HGET', GATE, 'p:' .. process))
  if dead then
    state.in_use = math.max(0, state.in_use - dead.held)
    state.active = math.max(0, state.active - is_active(dead))
    if dead.kind == 'p' then state.callers = math.max(0, state.callers - 1) end
    return_jobs(dead.number, 1)
  end
  if redis.call('ZREM', TICKETS, process) == 1 then state.waiting = state.waiting - 1 end
  for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do redis.call('ZREM', idle_of(flow), process) end
  redis.call('ZREM', LEASES, process)
  redis.call('HDEL', GATE, 'p:' .. process, 'a:' .. process)
end

-- Whoever calls reaps the dead: slots and claims together, never one without the other.
local function reap()
  if now <= state.reap_at then return end
  local rows = redis.call('ZRANGE', LEASES, 0, 63, 'WITHSCORES')
  state.reap_at = now + state.lease
  for i = 1, #rows, 2 do
    local ends = tonumber(rows[i + 1])
    if ends >= now then
      state.reap_at = math.min(state.reap_at, ends)
      return
    elseif rows[i] ~= me then
      bury(rows[i])
    end
  end
  if #rows == 128 then state.reap_at = now end
end

-- settle ----------------------------------------------------------------------------------------

local ENDED = { completed = true, failed = true, aborted = true, quarantined = true, lost = true }

local changed = { records = {}, keys = {}, fields = {}, queues = {}, running = {} }

local function move(flow, id, score)
  local list = changed.queues[flow] or {}
  local n = #list
  changed.queues[flow] = list
  list[n + 1], list[n + 2] = score, id
end

local batches = {} -- what each batch's ended runs change, written once per call
local AFTER_TAG = #string.match(GATE, '{.-}') + 2 -- where the batch begins in a job id

-- Batch and index of a job id `{limit}:batch:index`.
local function parts(id)
  return string.match(id, '^([^:]+):(%d+)$', AFTER_TAG)
end

local function record_outcome(id, attempt, status, outcome)
  local name, index = parts(id)
  local batch = batches[name]
  if not batch then
    batch = { bits = {}, counts = {}, ended = 0, out = ROOT .. 'out:' .. name }
    batches[name] = batch
  end
  redis.call('XADD', batch.out, '*', 'i', index, 't', attempt, 's', status, 'o', outcome)
  if status ~= 'lost' then -- what was lost may be enqueued again
    local bits, n = batch.bits, #batch.bits
    bits[n + 1], bits[n + 2], bits[n + 3], bits[n + 4] = 'SET', 'u1', index, '1'
  end
  batch.counts[status] = (batch.counts[status] or 0) + 1
  batch.ended = batch.ended + 1
end

-- Keys of a batch live until the producer deletes them, else a week after its last outcome.
local function close_batches()
  for name, batch in pairs(batches) do
    local key, done, out = ROOT .. 'batch:' .. name, ROOT .. 'done:' .. name, ROOT .. 'out:' .. name
    if #batch.bits > 0 then redis.call('BITFIELD', done, unpack(batch.bits)) end
    local left = tonumber(redis.call('HGET', key, 'left') or '')
    if left then
      for status, count in pairs(batch.counts) do redis.call('HINCRBY', key, status, count) end
      left = redis.call('HINCRBY', key, 'left', -batch.ended)
    end
    if not left or left <= 0 then
      for _, each in ipairs({ key, done, out, ROOT .. 'base:' .. name }) do redis.call('PEXPIRE', each, WEEK) end
    end
  end
end

local function forget(id, flow)
  local keys, fields, list = changed.keys, changed.fields, changed.queues[flow] or {}
  local n = #keys
  changed.queues[flow] = list
  keys[n + 1], keys[n + 2] = 'arq:job:' .. id, 'arq:in-progress:' .. id
  fields[#fields + 1] = id
  list.gone = list.gone or {}
  list.gone[#list.gone + 1] = id
end

local function note(id, job)
  local records, n = changed.records, #changed.records
  records[n + 1], records[n + 2] = id, write_job(job)
end

local function give_back(id, job, score)
  changed.keys[#changed.keys + 1] = 'arq:in-progress:' .. id
  note(id, job)
  move(job.flow, id, score)
end

local SETTLE = {
  refuse = function(id, job, delay)
    job.refused = job.refused + 1
    local due = math.max(now + tonumber(delay), state.pause)
    redis.call('ZADD', LATER, whole(due), id)
    state.due = state.due == 0 and due or math.min(state.due, due)
    give_back(id, job, whole(PARKED))
    delayed[job.flow] = math.min(due, delayed[job.flow] or due)
  end,
  back = function(id, job)
    give_back(id, job, whole(job.place))
    returned_flows[job.flow] = true
  end,
  hand = function(id, job)
    job.backs = job.backs + 1
    give_back(id, job, whole(job.place))
    returned_flows[job.flow] = true
  end,
  keep = function(id, job)
    local running, n = changed.running, #changed.running
    running[n + 1], running[n + 2] = 'arq:in-progress:' .. id, me
    note(id, job)
    move(job.flow, id, whole(PARKED + record.number))
  end,
}

-- While a gate that lost its data holds, what it does not know is adopted.
local function adopted(id, attempt, what, flow, opens)
  local name, index = parts(id)
  if now >= opens or what == 'back' or not flow then return nil end
  if redis.call('GETBIT', ROOT .. 'done:' .. name, index) == 1 then return nil end
  -- not yet enqueued again by its producer, so nobody has counted it
  if not redis.call('ZSCORE', queue_of(flow), id) then redis.call('HINCRBY', ROOT .. 'batch:' .. name, 'left', 1) end
  return { attempt = attempt, place = state.place, deaths = 0, refused = 0, backs = 0, flow = flow }
end

local function settle_entry(i, job, opens)
  local id, attempt, what, arg = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 3], ARGV[i + 4]
  job = job or adopted(id, attempt, what, call.flows[tonumber(ARGV[i + 2])], opens)
  if not job or job.attempt ~= attempt then return false end
  local status = ENDED[what] and what or string.match(what, '^blob:(.+)$')
  if status then
    record_outcome(id, ARGV[i + 1], status, arg)
    forget(id, job.flow)
  elseif SETTLE[what] then
    SETTLE[what](id, job, arg)
  else
    redis.call('SET', 'arq:result:' .. id, arg, 'PX', string.match(what, '^result:(%d+)$'))
  end
  return true
end

local function write_changes()
  for flow, list in pairs(changed.queues) do
    if list.gone then chunks(list.gone, 1000, function(...) redis.call('ZREM', queue_of(flow), ...) end) end
    if #list > 0 then chunks(list, 2000, function(...) redis.call('ZADD', queue_of(flow), ...) end) end
  end
  chunks(changed.keys, 2000, function(...) redis.call('DEL', ...) end)
  chunks(changed.fields, 1000, function(...) redis.call('HDEL', JOBS, ...) end)
  chunks(changed.records, 2000, function(...) redis.call('HSET', JOBS, ...) end)
  chunks(changed.running, 2000, function(...) redis.call('MSET', ...) end)
end

-- Ends, refusals and runs given back, each only if the attempt is still its own. Returns what was not.
local function settle(opens)
  local ids, refused = {}, {}
  for i = FIRST_ENTRY, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
  if #ids == 0 then return refused end
  local known = {}
  chunks(ids, 1000, function(...)
    for _, text in ipairs(redis.call('HMGET', JOBS, ...)) do known[#known + 1] = text end
  end)
  for n, id in ipairs(ids) do
    if not settle_entry(FIRST_ENTRY + (n - 1) * 5, read_job(known[n] or ''), opens) then
      refused[#refused + 1] = id
    end
  end
  write_changes()
  close_batches()
  return refused
end

-- level -----------------------------------------------------------------------------------------

-- One cut per episode: only a run admitted after the last cut can cut again, or, after 30 s in which
-- none of those ended, any. Growth only while the level is what holds the fleet back.
local function adapt(ceiling, in_use_before)
  if call.pause > 0 then state.pause = math.max(state.pause, now + call.pause) end
  local floor = math.min(state.min, ceiling)
  if call.refused > 0 and (call.refused > state.cut or now - state.quiet > 30000000) then
    state.level = math.max(floor, state.level * state.backoff)
    state.cut, state.oks, state.quiet = state.attempt, 0, now
  elseif call.successes > 0 and call.counted_under == state.cut then
    state.quiet = now
    if in_use_before >= math.floor(state.level) and state.level < ceiling then
      state.oks = state.oks + call.successes
      if state.oks >= state.threshold then
        state.level = math.min(ceiling, math.max(state.level + 1, state.level * state.factor))
        state.oks = 0
      end
    end
  end
end

-- window ----------------------------------------------------------------------------------------

-- Slack: a process that had to give grants back doubles it (at most 5 s); it decays by a sixteenth of
-- the time that passes, so that stamps stay in order.
local function tune_slack()
  local least = math.max(state.window / 240, 10000)
  local slack = math.max(least, state.slack)
  slack = math.max(least, slack - (now - state.slack_at) / 16)
  if call.returned ~= '' then
    for stamp, count in string.gmatch(call.returned, '(%d+) (%d+)') do
      redis.call('LREM', STARTS, count, stamp)
    end
    if string.sub(call.returned, 1, 4) == 'late' then slack = math.min(5000000, slack * 2) end
  end
  state.slack, state.slack_at = math.floor(slack), now
end

-- Forget the starts that are older than the window; returns how many are left.
local function trim_starts(rate)
  local used = rate > 0 and redis.call('LLEN', STARTS) or 0
  if used == 0 then return 0 end
  local edge = now - state.window
  local low, high = 0, used -- first index whose stamp is inside the window lies in [low, high]
  if tonumber(redis.call('LINDEX', STARTS, 0)) > edge then return used end
  while low < high do
    local middle = math.floor((low + high) / 2)
    if tonumber(redis.call('LINDEX', STARTS, middle)) <= edge then low = middle + 1 else high = middle end
  end
  redis.call('LTRIM', STARTS, low, -1)
  return used - low
end

-- Runs whose time has come go back to their own places, at most 500 per call.
local function release_due()
  if state.due == 0 or now < state.due then return end
  local ids = redis.call('ZRANGEBYSCORE', LATER, '-inf', whole(now), 'LIMIT', 0, 500)
  for _, id in ipairs(ids) do
    local job = read_job(redis.call('HGET', JOBS, id))
    if job then
      redis.call('ZADD', queue_of(job.flow), whole(job.place), id)
      returned_flows[job.flow] = true
    end
    redis.call('ZREM', LATER, id)
  end
  local first = redis.call('ZRANGE', LATER, 0, 0, 'WITHSCORES')
  state.due = first[2] and tonumber(first[2]) or 0
end

-- admit -----------------------------------------------------------------------------------------

local function first_ticket() return redis.call('ZRANGE', TICKETS, 0, 0)[1] end

local function take_ticket()
  state.ticket = state.ticket + 1
  if redis.call('ZADD', TICKETS, whole(state.ticket), me) == 1 then
    state.waiting = state.waiting + 1
    if state.waiting == 1 then expire(TICKETS) end
  end
end

local function set_kind(kind)
  state.callers = state.callers + (kind == 'p' and 1 or 0) - (record.kind == 'p' and 1 or 0)
  record.kind = kind
end

local function drop_ticket()
  if record.kind ~= '-' and redis.call('ZREM', TICKETS, me) == 1 then state.waiting = state.waiting - 1 end
  set_kind('-')
end

-- A head that was told to call and stays silent while something is free goes to the tail until it calls.
local function pass_over_silent_head(free)
  if state.waiting < 2 or free <= 0 then return end
  local head = first_ticket()
  if head and head ~= me and head == state.woken and now > state.woken_due + GRACE then
    state.ticket = state.ticket + 1
    redis.call('ZADD', TICKETS, whole(state.ticket), head)
    state.woken = ''
  end
end

-- How many of the free places this process may take. Between processes it goes round by ticket; one
-- that finished something takes its next jobs in the same call up to its fair share.
local function turn(free, ended)
  if free <= 0 then return 0 end
  local others = state.waiting - (record.kind ~= '-' and 1 or 0)
  if others <= 0 then return free end
  local share = math.ceil(math.floor(state.level) / math.max(1, state.active + 1))
  local head = first_ticket()
  if head == me then return math.min(free, math.max(1, share)) end
  if ended > 0 and call.permits == 0 and state.callers == 0 then
    return math.max(0, math.min(free, ended, share - record.held))
  end
  return 0
end

-- The waiting jobs with the lowest places among the flows this process knows: at most `count`, and
-- whether more are left.
local function lowest_places(count)
  local heap = {}
  for _, flow in ipairs(call.flows) do
    local rows = redis.call('ZRANGE', queue_of(flow), 0, count, 'WITHSCORES')
    for i = 1, #rows, 2 do
      local place = tonumber(rows[i + 1])
      if place >= PARKED then break end
      heap[#heap + 1] = { id = rows[i], place = place, flow = flow }
    end
  end
  if #call.flows > 1 then
    table.sort(heap, function(a, b) return a.place < b.place or (a.place == b.place and a.id < b.id) end)
  end
  local more = #heap > count and heap[count + 1].flow or nil
  for i = #heap, count + 1, -1 do heap[i] = nil end
  return heap, more
end

local function add_claimed(claimed, id, job, payload)
  local n = #claimed
  claimed[n + 1], claimed[n + 2], claimed[n + 3] = id, whole(job.attempt), job.deaths
  claimed[n + 4], claimed[n + 5], claimed[n + 6] = job.refused, job.backs, payload
end

-- Claim the chosen jobs: attempt, record, parked place, in-progress mark. A job whose payload is gone
-- ends as lost.
local function claim(chosen)
  if #chosen == 0 then return {} end
  local ids, payload_keys = {}, {}
  for i, c in ipairs(chosen) do ids[i], payload_keys[i] = c.id, 'arq:job:' .. c.id end
  local payloads = redis.call('MGET', unpack(payload_keys))
  local known = redis.call('HMGET', JOBS, unpack(ids))
  changed = { records = {}, keys = {}, fields = {}, queues = {}, running = {} }
  batches = {}
  local claimed = {}
  for i, c in ipairs(chosen) do
    local job = read_job(known[i] or '') or { deaths = 0, refused = 0, backs = 0, place = c.place, flow = c.flow }
    state.attempt = state.attempt + 1
    job.attempt = state.attempt
    if payloads[i] then
      SETTLE.keep(c.id, job)
      add_claimed(claimed, c.id, job, payloads[i])
    else
      record_outcome(c.id, whole(job.attempt), 'lost', '')
      forget(c.id, c.flow)
    end
    state.place = math.max(state.place, c.place)
  end
  write_changes()
  close_batches()
  return claimed
end

local function stamp_starts(count, rate)
  if count == 0 or rate == 0 then return 0 end
  local stamp, list = now + state.slack, {}
  for i = 1, count do list[i] = whole(stamp) end
  local length = 0
  chunks(list, 1000, function(...) length = redis.call('RPUSH', STARTS, ...) end)
  if length == count then expire(STARTS) end
  return stamp
end

-- wake ------------------------------------------------------------------------------------------

-- When the next place comes free by itself, us; nil when only a release can free one.
local function next_free(closed_until, rate, used)
  if now < closed_until then return closed_until end
  if math.floor(state.level) - state.in_use <= 0 then return nil end
  if rate > 0 and used >= rate then
    return tonumber(redis.call('LINDEX', STARTS, used - rate)) + state.window
  end
  return now
end

-- Only the head has a timer and only the head is woken; it gets the time at which it is due.
local function wake_head(due)
  if state.woken == me then state.woken = '' end -- it has called: a later head must be told anew
  local head = state.waiting > 0 and first_ticket() or nil
  if not head then
    state.woken, state.waiting = '', 0
  elseif head == me then
    state.woken, state.woken_due = me, due or now + state.lease
  elseif due and (head ~= state.woken or due < state.woken_due) then
    publish(head, math.max(0, due - now))
    state.woken, state.woken_due = head, due
  end
  return head
end

-- Idle processes may be left asleep when fewer were woken than jobs came: while nobody waits by ticket,
-- wake one per flow that has both, so that one stands by ticket, with a timer, whenever jobs wait.
local function wake_left_behind()
  state.behind = 0
  for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
    if redis.call('ZCARD', idle_of(flow)) > 0 then
      local first = redis.call('ZRANGE', queue_of(flow), 0, 0, 'WITHSCORES')
      if first[2] and tonumber(first[2]) < PARKED then
        wake_idle(flow)
        state.behind = 1
      end
    end
  end
end

-- The first idle process of the flow hears when a delayed run is due; it goes on standing idle.
local function tell_idle(flow, due)
  local first = redis.call('ZRANGE', idle_of(flow), 0, 0)[1]
  if first then publish(first, math.max(0, due - now)) end
end

local function stand_idle(idle)
  if idle then
    for _, flow in ipairs(call.flows) do
      if redis.call('ZADD', idle_of(flow), whole(now), me) == 1 then expire(idle_of(flow)) end
    end
  elseif record.idle then
    for _, flow in ipairs(call.flows) do redis.call('ZREM', idle_of(flow), me) end
  end
  record.idle = idle
end

local function renew_lifetimes()
  for _, key in ipairs({ GATE, LEASES, STARTS, TICKETS, FLOWS }) do expire(key) end
end

-- Written only when a fifth of it is gone: most calls of a busy process need not touch the lease.
local function extend_lease(stretched)
  local ends = now + (stretched and 2 * state.lease or state.lease)
  if record.ends - now < 0.8 * state.lease or record.ends > now + 2 * state.lease or stretched then
    redis.call('ZADD', LEASES, whole(ends), me)
    record.ends = ends
  end
end

local function answer(header, refused, claimed)
  local reply = { header, state.override, refused }
  for _, value in ipairs(claimed) do reply[#reply + 1] = value end
  return reply
end

-- The same number gets the same answer: header and ids as stored, payloads and records read again.
local function answer_again()
  record.extended = false
  record.ends = now + state.lease
  redis.call('ZADD', LEASES, whole(record.ends), me)
  save(state, was, { 'p:' .. me, write_record(record) })
  local stored = redis.call('HGET', GATE, 'a:' .. me) or ''
  local header, refused, ids = string.match(stored, '^([^\n]*)\n([^\n]*)\n([^\n]*)$')
  local claimed = {}
  for id in string.gmatch(ids or '', '%S+') do
    local job, payload = read_job(redis.call('HGET', JOBS, id)), redis.call('GET', 'arq:job:' .. id)
    if job and payload then
      add_claimed(claimed, id, job, payload)
    end
  end
  return answer(header, refused, claimed)
end

local function leave()
  drop_ticket()
  stand_idle(false)
  state.in_use = math.max(0, state.in_use - record.held)
  redis.call('ZREM', LEASES, me)
  redis.call('HDEL', GATE, 'p:' .. me, 'a:' .. me)
end

-- the call --------------------------------------------------------------------------------------

if record and call.seq < record.seq then return { '-1' } end
extend_after_stall(state, now)
if record and call.seq == record.seq then return answer_again() end

local fresh = state.gen == 0
if fresh then create_gate() end
if call.birth > 0 and call.birth < state.gen then state.cold = 1 end
if call.started == 0 then call.started = now end
take_limits()
if state.lease == 0 then return redis.error_reply('NOLIMITS this limit has no values yet') end
local max, rate, held_until = effective()
bound_level(max)
local opens = state.cold == 1 and state.gen + math.max(state.lease, rate > 0 and state.window or 0) or 0
if now >= opens then state.cold = 0 end

reap()
local unknown = not record and call.seq > 1 and call.held > 0
join()
if unknown then call.permits, call.jobs = 0, 0 end
local in_use_before = state.in_use
local refused = settle(opens)
if call.leave then return_jobs(record.number, 0) end -- granted in an answer that it never heard
local ended = math.max(0, record.held - call.held)
state.in_use = math.max(0, state.in_use + call.held - record.held)
record.held = call.held
adapt(max, in_use_before)
tune_slack()
local used = trim_starts(rate)
release_due()

local closed_until = math.max(state.pause, opens, held_until)
local free = now < closed_until and 0 or math.floor(state.level) - state.in_use
if rate > 0 then free = math.min(free, rate - used) end
pass_over_silent_head(free)
local cap = call.leave and 0 or turn(free, ended)
local permits = math.min(call.permits, cap)
state.attempt = state.attempt + permits
local permit_attempt = state.attempt
local count = math.min(call.jobs, cap - permits)
local chosen, more = {}, nil
if call.jobs > 0 then chosen, more = lowest_places(count) end
local claimed = claim(chosen)
local given = permits + #claimed / 6
local stamp = stamp_starts(given, rate)
used = rate > 0 and used + given or 0
record.held = record.held + given
state.in_use = state.in_use + given
free = free - given

local gate_refused = permits < call.permits or (more ~= nil and count < call.jobs)
if gate_refused then
  if given > 0 or record.kind == '-' then take_ticket() end
  set_kind(permits < call.permits and 'p' or 'j')
else
  drop_ticket()
end
local was_idle = record.idle
stand_idle(not call.leave and not more and call.jobs > #claimed / 6)

local due = next_free(closed_until, rate, used)
local head = wake_head(due)
if free > 0 and not head and more then returned_flows[more] = true end
for flow in pairs(returned_flows) do
  if wake_idle(flow) > 0 then state.behind = 1 end
end
if not head and state.behind == 1 and next(returned_flows) == nil then wake_left_behind() end
if not record.idle then
  if was_idle and state.due > 0 then
    for _, flow in ipairs(call.flows) do tell_idle(flow, state.due) end
  end
  for flow, at in pairs(delayed) do tell_idle(flow, at) end
end

local reason = '-'
if gate_refused then
  if now < opens then reason = 'cold'
  elseif now < closed_until then reason = 'pause'
  elseif math.floor(state.level) - state.in_use <= 0 then reason = 'level'
  elseif rate > 0 and used >= rate then reason = 'window'
  else reason = 'turn' end
elseif unknown then reason = 'cold'
elseif call.jobs > #claimed / 6 then reason = 'jobs' end

local stretched = state.waiting > 100 and record.held == 0 and gate_refused and head ~= me
local wait = stretched and state.lease or state.lease / 3
if state.reap_at >= now and (gate_refused or record.idle) then wait = math.min(wait, state.reap_at - now + 1000) end
if gate_refused and head == me and due then wait = math.min(wait, due - now) end
if gate_refused and head ~= me and free > 0 then wait = math.min(wait, GRACE) end
if record.idle and state.due > 0 then wait = math.min(wait, state.due - now) end
if more and #chosen > #claimed / 6 then wait = 0 end -- some were lost: ask again for what is left
wait = math.max(0, math.ceil(wait))

local renew = now - state.touched >= state.lease / 3
if renew then state.touched = now end
if not call.leave then extend_lease(stretched) end
local header = table.concat({
  unknown and 1 or 0, permits, whole(wait), whole(now), whole(state.gen), whole(call.started), whole(state.cut),
  exact(state.level), whole(state.in_use), whole(used), whole(stamp), whole(state.slack),
  whole(record.ends - now), reason, whole(permit_attempt),
}, ' ')
if call.leave then
  leave()
  save(state, was)
else
  record.seq = call.seq
  state.active = state.active + is_active(record)
  local ids = {}
  for i = 1, #claimed, 6 do ids[#ids + 1] = claimed[i] end
  local stored = header .. '\n' .. table.concat(refused, ' ') .. '\n' .. table.concat(ids, ' ')
  save(state, was, { 'p:' .. me, write_record(record), 'a:' .. me, stored })
end
if renew then renew_lifetimes() end
return answer(header, table.concat(refused, ' '), claimed)
