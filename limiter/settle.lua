-- settle: what the call says has ended, was refused or goes back. Part of sync.lua.

-- Made only by a call that brings entries, or finds a job's payload gone.
local function settling()
  local settled = {}

  local ENDED = { completed = true, failed = true, aborted = true, quarantined = true, lost = true }

  -- What changes, written once at the end by `write`. `saved`: job id -> checkpoint, or false.
  local changed = { records = {}, keys = {}, fields = {}, queues = {}, running = {}, saved = {} }

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

  -- The fields of a record that a run needs which ended or goes on: the others stay in `text`, `saved` at `at`.
  local function read_part(text)
    local attempt, at, saved, flow = string.match(text or '', '^(%d+) %d+ %d+ %d+ %d+ ()(%d) (.+)$')
    return attempt and { attempt = tonumber(attempt), saved = tonumber(saved), flow = flow, text = text, at = at } or nil
  end

  -- Where a checkpoint too large for a call stands.
  local function kept_of(id)
    local name, index = parts(id)
    return ROOT .. 'kept:' .. name .. ':' .. index
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

  -- Count what has ended; returns how many are left, nil for a batch that nobody counts.
  local function count_ended(key, batch)
    local names = { 'left' }
    for status in pairs(batch.counts) do names[#names + 1] = status end
    local found = redis.call('HMGET', key, unpack(names))
    local left = count_of(found[1])
    if not left then return nil end
    left = left - batch.ended
    local fields = { 'left', whole(left) }
    for i = 2, #names do
      fields[2 * i - 1], fields[2 * i] = names[i], whole((count_of(found[i]) or 0) + batch.counts[names[i]])
    end
    redis.call('HSET', key, unpack(fields))
    return left
  end

  -- Keys of a batch live until the producer deletes them, else as long after its last outcome as it says.
  local function close_batches()
    for name, batch in pairs(batches) do
      local key, done = ROOT .. 'batch:' .. name, ROOT .. 'done:' .. name
      if #batch.bits > 0 then redis.call('BITFIELD', done, unpack(batch.bits)) end
      local left = count_ended(key, batch)
      if not left or left <= 0 then
        expire_batch(name)
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

  local function drop_saved(id, job)
    if job.saved == INLINE then changed.saved[id] = false end
    if job.saved == BESIDE then redis.call('DEL', kept_of(id)) end
  end

  local function note(id, job)
    local records, n = changed.records, #changed.records
    records[n + 1], records[n + 2] = id, write_job(job)
  end

  -- Note where the checkpoint stands now.
  local function flag_saved(id, job, where)
    if job.saved == where then return end
    job.saved = where
    if not job.text then return note(id, job) end
    job.text = string.sub(job.text, 1, job.at - 1) .. where .. string.sub(job.text, job.at + 1)
    local records, n = changed.records, #changed.records
    records[n + 1], records[n + 2] = id, job.text
  end

  local function give_back(id, job, score)
    changed.keys[#changed.keys + 1] = 'arq:in-progress:' .. id
    note(id, job)
    move(job.flow, id, score)
  end

  -- Back to its own place, but not before `due`.
  local function put_off(id, job, due)
    redis.call('ZADD', LATER, whole(due), id)
    state.due = state.due == 0 and due or math.min(state.due, due)
    give_back(id, job, whole(PARKED))
    delayed[job.flow] = math.min(due, delayed[job.flow] or due)
  end

  local function go_back(id, job)
    give_back(id, job, whole(job.place))
    returned_flows[job.flow] = true
  end

  local SETTLE = {
    refuse = function(id, job, delay)
      job.refused = job.refused + 1
      gate.refusals = gate.refusals + 1
      put_off(id, job, math.max(now + tonumber(delay), state.pause))
    end,
    wait = function(id, job, delay) put_off(id, job, now + tonumber(delay)) end,
    save = function(id, job, checkpoint)
      if job.saved == BESIDE then redis.call('DEL', kept_of(id)) end
      changed.saved[id] = checkpoint
      flag_saved(id, job, INLINE)
    end,
    ['save-beside'] = function(id, job, key)
      if redis.call('EXISTS', key) == 0 then return end -- heard before; what it brought is kept already
      redis.call('RENAME', key, kept_of(id))
      redis.call('PERSIST', kept_of(id))
      if job.saved == INLINE then changed.saved[id] = false end
      flag_saved(id, job, BESIDE)
    end,
    back = go_back,
    hand = function(id, job)
      job.backs = job.backs + 1
      go_back(id, job)
    end,
    died = function(id, job)
      job.deaths = job.deaths + 1
      go_back(id, job)
    end,
    keep = function(id, job)
      local running, n = changed.running, #changed.running
      running[n + 1], running[n + 2] = 'arq:in-progress:' .. id, me
      note(id, job)
      move(job.flow, id, gate.parked)
    end,
  }

  -- While a gate that lost its data holds, what it does not know is adopted.
  local function adopted(id, attempt, what, flow)
    local name, index = parts(id)
    if now >= gate.opens or what == 'back' or not flow then return nil end
    if redis.call('GETBIT', ROOT .. 'done:' .. name, index) == 1 then return nil end
    -- not yet enqueued again by its producer, so nobody has counted it
    if not redis.call('ZSCORE', queue_of(flow), id) then
      local key = ROOT .. 'batch:' .. name
      redis.call('HSET', key, 'left', whole((count_of(redis.call('HGET', key, 'left')) or 0) + 1))
    end
    return { attempt = attempt, place = state.place, deaths = 0, refused = 0, backs = 0, saved = INLINE, flow = flow }
  end

  -- What a run that goes on sends; where it is adopted, it is claimed again at once.
  local GOES_ON = { save = true, ['save-beside'] = true }

  -- The record of an entry's job as the entries before it left it; `text` is what stands in Redis.
  local function job_of(i, known, text)
    local id, what = ARGV[i], ARGV[i + 3]
    local partly = ENDED[what] or GOES_ON[what]
    if known and (partly or not known.text) then return known end
    if known then return read_job(known.text) end
    if text then return (partly and read_part or read_job)(text) end
    local job = adopted(id, tonumber(ARGV[i + 1]), what, call.flows[tonumber(ARGV[i + 2])])
    if job and GOES_ON[what] then SETTLE.keep(id, job) end
    return job
  end

  -- Where an outcome too large for a call was stored first, for a week.
  local function blob_of(id, attempt)
    local name, index = parts(id)
    return ROOT .. 'blob:' .. name .. ':' .. index .. ':' .. attempt
  end

  -- Recorded, it lives as long as its batch. Returns whether it is there: it may be lost since it was stored.
  local function keep_blob(id, attempt)
    local name, index = parts(id)
    local key = blob_of(id, attempt)
    local outcome = redis.call('GET', key)
    if not outcome then return false end
    redis.call('HSET', ROOT .. 'blobs:' .. name, index .. ':' .. attempt, outcome)
    redis.call('DEL', key)
    return true
  end

  local function settle_entry(i, job)
    local id, attempt, what, arg = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 3], ARGV[i + 4]
    if not job or job.attempt ~= attempt then
      if string.sub(what, 1, 5) == 'blob:' then redis.call('DEL', blob_of(id, ARGV[i + 1])) end
      return false
    end
    local act = SETTLE[what]
    local status = ENDED[what] and what or not act and string.match(what, '^blob:(.+)$')
    if act then
      act(id, job, arg)
    elseif status and status ~= what and not keep_blob(id, ARGV[i + 1]) then
      go_back(id, job) -- it runs again: an end without its outcome would be nobody's
    elseif status then
      record_outcome(id, ARGV[i + 1], status, arg)
      forget(id, job.flow)
      drop_saved(id, job)
    else
      redis.call('SET', 'arq:result:' .. id, arg, 'PX', string.match(what, '^result:(%d+)$'))
    end
    return true
  end

  local function write_saved()
    local kept, dropped = {}, {}
    for id, checkpoint in pairs(changed.saved) do
      if checkpoint then
        kept[#kept + 1], kept[#kept + 2] = id, checkpoint
      else
        dropped[#dropped + 1] = id
      end
    end
    chunks(kept, 2000, function(...) redis.call('HSET', SAVED, ...) end)
    chunks(dropped, 1000, function(...) redis.call('HDEL', SAVED, ...) end)
  end

  -- What goes away comes last: one call may keep a run and end it.
  function settled.write()
    for flow, list in pairs(changed.queues) do
      if #list > 0 then chunks(list, 2000, function(...) redis.call('ZADD', queue_of(flow), ...) end) end
      if list.gone then chunks(list.gone, 1000, function(...) redis.call('ZREM', queue_of(flow), ...) end) end
    end
    chunks(changed.records, 2000, function(...) redis.call('HSET', JOBS, ...) end)
    chunks(changed.running, 2000, function(...) redis.call('MSET', ...) end)
    chunks(changed.keys, 2000, function(...) redis.call('DEL', ...) end)
    chunks(changed.fields, 1000, function(...) redis.call('HDEL', JOBS, ...) end)
    if next(changed.saved) then write_saved() end
    close_batches()
  end

  -- Jobs, each with its id and queue, that were claimed but whose payloads are gone: they end as lost.
  function settled.lose(jobs)
    for _, each in ipairs(jobs) do
      record_outcome(each.id, whole(each.job.attempt), 'lost', '')
      forget(each.id, each.flow)
      drop_saved(each.id, each.job)
    end
    settled.write()
  end

  -- Ends, refusals and runs given back, each only if the attempt is still its own; the others are named.
  function settled.entries()
    local ids, refused = {}, {}
    for i = FIRST_ENTRY, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
    local known = {}
    chunks(ids, 1000, function(...)
      for _, text in ipairs(redis.call('HMGET', JOBS, ...)) do known[#known + 1] = text end
    end)
    local jobs = {} -- one record per job, also where several entries name it
    for n, id in ipairs(ids) do
      local at = FIRST_ENTRY + (n - 1) * 5
      jobs[id] = job_of(at, jobs[id], known[n])
      if not settle_entry(at, jobs[id]) then
        refused[#refused + 1] = id
      end
    end
    settled.write()
    return refused
  end

  return settled
end

-- The whole step: entries, slots, level.
local function settle()
  local in_use_before = state.in_use
  gate.refused = #ARGV >= FIRST_ENTRY and settling().entries() or {}
  if call.leave then reaper().return_jobs(record.number, 0) end -- granted in an answer that it never heard
  gate.ended = math.max(0, record.held - call.held)
  state.in_use = math.max(0, state.in_use + call.held - record.held)
  if call.held ~= record.held then record.held, record.since = call.held, now end
  adapt(in_use_before)
end
